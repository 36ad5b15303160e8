"""What an image shows, against what its prompt asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvar.training.data import BACKGROUNDS, LAYOUT_SIDES, Combination, Pictures, captions
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
        # Composing is linear, so the small layers are blurred once instead of every composed picture.
        layers = pictures.layers.float()
        self._color, alpha = F.avg_pool2d(layers, _BLUR).split((3, 1), dim=1)
        self._clear = 1 - alpha / 255

    def distances(self, image: Tensor, background_index: int) -> Tensor:
        """Mean squared distance of `image (3, H, W)` to each `(objects, layouts)` picture on that background."""
        background = torch.tensor(list(BACKGROUNDS.values())[background_index])[:, None, None]
        table = (self._color + self._clear * background) / 127.5 - 1
        distances = (table - F.avg_pool2d(image[None], _BLUR)).square().mean(dim=(1, 2, 3))
        return distances.view(len(OBJECTS), len(LAYOUT_SIDES))

    def background(self, image: Tensor) -> int:
        """The named colour nearest to the median colour of the outermost two pixels all round."""
        frame = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1), image[:, :, :2].flatten(1)], dim=1)
        colors = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
        return int((colors - frame.median(dim=1).values).square().sum(dim=1).argmin())


def measure_fidelity(images: Tensor, prompts: Sequence[Prompt], judge: Judge) -> dict[str, float]:
    """Shares of images `(N, 3, H, W)` that show what was asked for.

    `top1`, `top5`: the asked object is (among) the nearest of all on the asked background in the asked layout;
    `background`: by the frame's colour; `layout`: that of the nearest picture of any object in any layout.
    """
    hits: dict[str, int] = dict.fromkeys(("top1", "top5", "background", "layout"), 0)
    for image, prompt in zip(images, prompts, strict=True):
        asked = prompt.combination
        distances = judge.distances(image, asked.background_index)
        in_layout = distances[:, asked.layout_index]
        rank = int((in_layout < in_layout[asked.object_index]).sum())
        hits["top1"] += rank < 1
        hits["top5"] += rank < 5
        hits["background"] += judge.background(image) == asked.background_index
        hits["layout"] += int(distances.argmin()) % len(LAYOUT_SIDES) == asked.layout_index
    return {name: count / len(prompts) for name, count in hits.items()}
