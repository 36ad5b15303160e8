"""Prompts for the embedded model, in sets of graded detail: what skipping costs depends on what a prompt asks for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from skipvar.errors import InputError
from skipvar.training.backgrounds import BACKGROUNDS, PATTERNS
from skipvar.training.data import LAYOUT_SIDES, Combination, all_combinations, captions
from skipvar.training.objects import OBJECTS

_LAYOUT_NAMES = {1: "one", 4: "four", 9: "nine"}


@dataclass(frozen=True)
class Detail:
    """How often a set draws what: relative frequencies, by pattern and by layout."""

    patterns: tuple[float, ...]
    layouts: tuple[float, ...]


DETAILS = {
    "plain": Detail(patterns=(1, 0, 0, 0, 0), layouts=(1, 0.5, 0)),
    "mixed": Detail(patterns=(4, 1, 1, 1, 1), layouts=(1, 1, 1)),
    "high": Detail(patterns=(0, 1, 2, 2, 2), layouts=(0, 1, 2)),
}
"""By name of the set, from little detail to much; frequencies in the order of `PATTERNS` and of `LAYOUT_SIDES`."""


@dataclass(frozen=True)
class ComposedPrompt:
    """A caption and the kind of picture that it asks for."""

    prompt: str
    group: str
    """For emoji pattern and number of objects (`dotted, nine`), for photographs what kind of subject."""


def compose(detail: str, count: int, seed: int, without: Sequence[str] = ()) -> list[ComposedPrompt]:
    """`count` different prompts of a set; the same arguments give the same prompts.

    No combination of object, background and layout comes twice, and none whose captions hold one of `without`.
    """
    taken = frozenset(without)
    left = {one for one in all_combinations() if _is_drawn(one, DETAILS[detail])}
    if taken:
        left = {one for one in left if taken.isdisjoint(captions(one))}
    if len(left) < count:
        raise InputError(f"{count} prompts are asked for, but {len(left)} are left beside those to do without.")
    result: list[ComposedPrompt] = []
    draws = _draw(DETAILS[detail], seed)
    while len(result) < count:
        combination, share = next(draws)
        if combination in left:
            left.remove(combination)
            texts, background = captions(combination), BACKGROUNDS[combination.background_index]
            layout = _LAYOUT_NAMES[LAYOUT_SIDES[combination.layout_index] ** 2]
            result.append(ComposedPrompt(texts[int(share * len(texts))], f"{background.pattern}, {layout}"))
    return result


def _is_drawn(combination: Combination, detail: Detail) -> bool:
    """Whether the set may have such a picture."""
    pattern = PATTERNS.index(BACKGROUNDS[combination.background_index].pattern)
    return detail.patterns[pattern] > 0 and detail.layouts[combination.layout_index] > 0


def _draw(detail: Detail, seed: int) -> Iterator[tuple[Combination, float]]:
    """Combinations without end, and a number in [0, 1) that chooses a phrasing."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.tensor([detail.patterns[PATTERNS.index(b.pattern)] for b in BACKGROUNDS], dtype=torch.float32)
    layouts = torch.tensor(detail.layouts, dtype=torch.float32)
    while True:
        yield (
            Combination(
                object_index=int(torch.randint(len(OBJECTS), (1,), generator=generator)),
                background_index=int(torch.multinomial(frequencies, 1, generator=generator)),
                layout_index=int(torch.multinomial(layouts, 1, generator=generator)),
            ),
            float(torch.rand(1, generator=generator)),
        )
