"""All numbers that the embedded model is judged by: reconstruction, fidelity to the text, and what skipping costs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.regression import spearman_corrcoef

from skipvar.model.pipeline import Pipeline
from skipvar.training.data import BACKGROUNDS, LAYOUT_SIDES, Combination, Pictures, captions
from skipvar.training.objects import OBJECTS
from skipvar.training.recipe import DECISION_SCALE, NUM_SCALES, EvaluationRecipe
from skipvar.training.sample import generate

logger = logging.getLogger(__name__)

_BLUR = 4
"""Pictures are compared as means of 4x4 pixels."""


class Probe(Protocol):
    """What `skipvar.skip.probe.take_probe` returns."""

    @property
    def sobel_change(self) -> Tensor: ...
    @property
    def fft_high_frequency_ratio(self) -> Tensor: ...


TakeProbe = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, tuple[int, int]], Probe]


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


@dataclass(frozen=True)
class Generated:
    """Images of some prompts under `base` and with the last scales skipped, and their probes."""

    images: list[Tensor]
    """`(N, 3, H, W)` in [-1, 1]: base, skip_1, skip_2, skip_3."""
    sobel: dict[tuple[int, int], Tensor]
    """Probe grid to `(N,)`."""
    fft: dict[tuple[int, int], Tensor]


@torch.no_grad()
def generate_all(
    pipeline: Pipeline, prompts: Sequence[Prompt], settings: EvaluationRecipe, take_probe: TakeProbe
) -> Generated:
    """Every prompt under base and skip_1 to skip_3 (from the same bits), with the probe at each grid."""
    images: list[list[Tensor]] = [[] for _ in range(4)]
    sobel: dict[tuple[int, int], list[Tensor]] = {grid: [] for grid in settings.probe_grids}
    fft: dict[tuple[int, int], list[Tensor]] = {grid: [] for grid in settings.probe_grids}
    for start in range(0, len(prompts), settings.batch_size):
        part = prompts[start : start + settings.batch_size]
        features = [pipeline.text_encoder.encode(prompt.text) for prompt in part]
        lengths = [len(f) for f in features]
        padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        sums = generate(pipeline.transformer, padded, lengths, settings, [p.seed for p in part])
        for skipped in range(4):
            images[skipped].append(pipeline.decode(sums[NUM_SCALES - 1 - skipped]))
        for grid in settings.probe_grids:
            probe = take_probe(pipeline.decode, sums[DECISION_SCALE - 1], sums[DECISION_SCALE], grid)
            sobel[grid].append(probe.sobel_change)
            fft[grid].append(probe.fft_high_frequency_ratio)
        logger.info("generated %d of %d", start + len(part), len(prompts))
    return Generated(
        [torch.cat(parts) for parts in images],
        {grid: torch.cat(parts) for grid, parts in sobel.items()},
        {grid: torch.cat(parts) for grid, parts in fft.items()},
    )


class Judge:
    """Says what a picture shows: the nearest of all training pictures, as means of 4x4 pixels, mirrored or not."""

    def __init__(self, pictures: Pictures) -> None:
        # Composing is linear, so the small layers are blurred once instead of every composed picture.
        layers = pictures.layers.float()
        both = torch.cat([layers, layers.flip(-1)])
        self._color, alpha = F.avg_pool2d(both, _BLUR).split((3, 1), dim=1)
        self._clear = 1 - alpha / 255

    def distances(self, image: Tensor, background_index: int) -> Tensor:
        """Mean squared distance of `image (3, H, W)` to each `(objects, layouts)` picture on that background."""
        background = torch.tensor(list(BACKGROUNDS.values())[background_index])[:, None, None]
        table = (self._color + self._clear * background) / 127.5 - 1
        distances = (table - F.avg_pool2d(image[None], _BLUR)).square().mean(dim=(1, 2, 3))
        return distances.view(2, len(OBJECTS), len(LAYOUT_SIDES)).amin(dim=0)

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


def measure_skipping(generated: Generated, prompts: Sequence[Prompt], settings: EvaluationRecipe) -> dict[str, Any]:
    """SSIM to base of each skip strategy, by layout, and Spearman's correlation of the probe with that of skip_3."""
    unit = [(images + 1) / 2 for images in generated.images]
    ssim = torch.stack([_ssim(other, unit[0]) for other in unit[1:]])
    layouts = torch.tensor([p.combination.layout_index for p in prompts])
    result: dict[str, Any] = {"ssim_skip": [round(float(s.mean()), 4) for s in ssim]}
    for index, side in enumerate(LAYOUT_SIDES):
        result[f"ssim_skip_of_{side * side}"] = [round(float(s[layouts == index].mean()), 4) for s in ssim]
    for grid in settings.probe_grids:
        for name, values in (("sobel", generated.sobel[grid]), ("fft", generated.fft[grid])):
            result[f"spearman_{name}_at_{grid[0]}"] = [round(float(spearman_corrcoef(values, s)), 4) for s in ssim]
    last = settings.probe_grids[-1][0]
    result["spearman_sobel"] = result[f"spearman_sobel_at_{last}"][-1]
    result["spearman_fft"] = result[f"spearman_fft_at_{last}"][-1]
    return result


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM `(N,)` of images in [0, 1]."""
    parts = [
        torch.as_tensor(structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")).reshape(-1)
        for x, y in zip(a.split(50), b.split(50), strict=True)
    ]
    return torch.cat(parts)
