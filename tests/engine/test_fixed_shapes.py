"""Under fixed shapes nothing that rounds sees another shape because of a neighbour's text or guidance."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipvar.engine.engine import Engine
from skipvar.types import Image, Request

NUM_SCALES = 10
ROUNDING = ("mm", "bmm", "linear", "scaled_dot_product", "convolution", "softmax", "layer_norm", "group_norm", "fft")
"""Operations that add up many numbers, in an order that may depend on their shapes; what only moves or adds pairs of
numbers gives the same bits in any shape."""


class Shapes(TorchDispatchMode):
    """The operations that round, with the shapes that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ROUNDING):
            shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.seen.append((str(func), *shapes))
        return func(*args, **(kwargs or {}))


def run(engine: Engine, requests: Sequence[Request]) -> tuple[Image, list[tuple[Any, ...]]]:
    """The first image, and what was run for all, text apart: it is encoded row by row."""
    original, shapes = engine.sampler.encode_text, Shapes()
    engine.submit(requests)
    for queue in engine._batcher._queues.values():
        for _, image in queue:
            original(image)
    with shapes:
        finished = engine.drain()
    (image,) = [item for item in finished if isinstance(item, Image) and item.request == requests[0]]
    return image, shapes.seen


@pytest.fixture
def neighbours(make_request: Callable[..., Request]) -> dict[str, list[Request]]:
    """Four images each; the first is the same in all. Ids decide the strategies, so they stay the same too."""
    cfg = (3.0,) * NUM_SCALES
    plain = [make_request(position, prompt="an apple", cfg=cfg, negative_prompt=None) for position in range(4)]

    def others(**changes: object) -> list[Request]:
        made = [
            make_request(position, **{"prompt": "an apple", "cfg": cfg, "negative_prompt": None, **changes})
            for position in range(1, 4)
        ]
        return [plain[0], *made]

    return {
        "plain": plain,
        "long text": others(prompt="four red cars in a grid on a blue background, with many small details"),
        "long negative": others(negative_prompt="blurry, dark, a long text that says what is not wanted at all"),
        "no guidance in the end": others(cfg=(3.0,) * 5 + (1.0,) * 5),
    }


def test_neighbours_change_no_shape_and_no_bit(
    neighbours: dict[str, list[Request]], new_engine: Callable[..., Engine]
) -> None:
    expected, shapes = run(new_engine(batch_size=4, fixed_shapes=True), neighbours["plain"])
    assert len(shapes) > 200
    for name, requests in neighbours.items():
        image, seen = run(new_engine(batch_size=4, fixed_shapes=True), requests)
        assert seen == shapes, name
        assert np.array_equal(image.pixels, expected.pixels), name


def test_the_number_of_neighbours_changes_no_bit(
    neighbours: dict[str, list[Request]], new_engine: Callable[..., Engine]
) -> None:
    expected, _ = run(new_engine(batch_size=4, fixed_shapes=True), neighbours["plain"])
    for count in (1, 2, 3):
        image, _ = run(new_engine(batch_size=4, fixed_shapes=True), neighbours["long text"][:count])
        assert np.array_equal(image.pixels, expected.pixels)
