"""What an image shows, against what its prompt asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from skipvar.training.backgrounds import BACKGROUNDS, Background
from skipvar.training.data import LAYOUT_SIDES, Combination, Pictures, captions
from skipvar.training.objects import OBJECTS

_BLUR = 4
"""Pictures are compared as means of 4x4 pixels."""


@dataclass(frozen=True)
class Prompt:
    """A held-out combination, one of its captions, and the seed of its image."""

    combination: Combination
    text: str
    seed: int


def make_prompts(held_out: Sequence[Combination], count: int) -> list[Prompt]:
    """The first `count` held-out combinations; their order is random by the recipe's seed, the phrasing goes round."""
    return [
        Prompt(combination, (texts := captions(combination))[i % len(texts)], seed=i)
        for i, combination in enumerate(held_out[:count])
    ]


class Judge:
    """Says what a picture shows: the nearest of all training pictures, as means of 4x4 pixels."""

    def __init__(self, pictures: Pictures) -> None:
        layers = pictures.layers.float()
        self._color = F.avg_pool2d(layers[:, :3], _BLUR)
        self._clear = 1 - layers[:, 3:] / 255
        self._backgrounds = pictures.backgrounds
        self._tables: dict[int, Tensor] = {}

    def distances(self, image: Tensor, background_index: int) -> Tensor:
        """Mean squared distance of `image (3, H, W)` to each `(objects, layouts)` picture on that background."""
        if background_index not in self._tables:
            background = F.avg_pool2d(self._clear * self._backgrounds[background_index], _BLUR)
            self._tables[background_index] = (self._color + background) / 127.5 - 1
        distances = (self._tables[background_index] - F.avg_pool2d(image[None], _BLUR)).square().mean(dim=(1, 2, 3))
        return distances.view(len(OBJECTS), len(LAYOUT_SIDES))

    def background(self, image: Tensor, asked: Combination) -> Background:
        """The nearest background, seen where the asked object in its layout leaves it bare."""
        row = asked.object_index * len(LAYOUT_SIDES) + asked.layout_index
        bare = self._clear[row, 0] == 1
        distances = (self._backgrounds[:, :, bare] / 127.5 - 1 - image[:, bare]).square().mean(dim=(1, 2))
        return BACKGROUNDS[int(distances.argmin())]


def measure_fidelity(images: Tensor, prompts: Sequence[Prompt], judge: Judge) -> dict[str, float]:
    """Shares of images `(N, 3, H, W)` that show what was asked for.

    `top1`, `top5`: the asked object is (among) the nearest of all on the asked background in the asked layout;
    `background`, `pattern`: the nearest background's colour and pattern; `layout`: that of the nearest picture of any
    object in any layout.
    """
    hits = dict.fromkeys(("top1", "top5", "background", "pattern", "layout"), 0)
    for image, prompt in zip(images, prompts, strict=True):
        asked = prompt.combination
        distances = judge.distances(image, asked.background_index)
        in_layout = distances[:, asked.layout_index]
        rank = int((in_layout < in_layout[asked.object_index]).sum())
        hits["top1"] += rank < 1
        hits["top5"] += rank < 5
        background, wanted = judge.background(image, asked), BACKGROUNDS[asked.background_index]
        hits["background"] += background.color == wanted.color
        hits["pattern"] += background.pattern == wanted.pattern
        hits["layout"] += int(distances.argmin()) % len(LAYOUT_SIDES) == asked.layout_index
    return {name: count / len(prompts) for name, count in hits.items()}
