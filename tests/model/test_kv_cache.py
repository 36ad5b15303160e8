"""The cache: what is written is seen, what is not written is seen once, and slots bring it back."""

import pytest
import torch
from torch import Tensor

from skipvar.model.kv_cache import KeyValueCache, SlotStore

DEPTH, HEADS, WIDTH = 2, 3, 4


def new_cache(rows: int, tokens: int, capacity: int | None = None) -> KeyValueCache:
    cache = KeyValueCache(
        depth=DEPTH,
        num_heads=HEADS,
        head_width=WIDTH,
        capacity=capacity or rows * tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.begin(rows, tokens)
    return cache


def fresh(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, rows, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return keys, values


def fill(cache: KeyValueCache, tokens: int, seed: int) -> None:
    for layer in range(DEPTH):
        cache.extend(layer, *fresh(cache.num_rows, tokens, seed + layer), write=True)
    cache.advance(tokens)


def test_scales_follow_each_other() -> None:
    cache = new_cache(2, 10)
    fill(cache, 3, seed=0)
    keys, values = fresh(2, 4, seed=9)
    seen = cache.extend(1, keys, values, write=True)
    assert torch.equal(seen[0], torch.cat([fresh(2, 3, 1)[0], keys], dim=2))
    assert torch.equal(seen[1], torch.cat([fresh(2, 3, 1)[1], values], dim=2))
    assert cache.length == 3
    cache.advance(4)
    assert cache.length == 7


def test_a_scale_that_is_not_written_sees_the_same_and_needs_no_room() -> None:
    written, unwritten = new_cache(2, 7), new_cache(2, 3)
    fill(written, 3, seed=0)
    fill(unwritten, 3, seed=0)
    new = fresh(2, 4, seed=5)
    seen, also = written.extend(0, *new, write=True), unwritten.extend(0, *new, write=False)
    assert all(torch.equal(a, b) for a, b in zip(seen, also, strict=True))
    assert torch.equal(unwritten.keys[0], fresh(2, 3, 0)[0])


def test_dropped_rows_are_the_last_ones() -> None:
    cache = new_cache(4, 5)
    fill(cache, 3, seed=0)
    cache.keep_rows(2)
    new = fresh(2, 2, seed=7)
    keys, _ = cache.extend(0, *new, write=True)
    assert torch.equal(keys, torch.cat([fresh(4, 3, 0)[0][:2], new[0]], dim=2))


def test_one_block_of_memory_serves_batches_of_any_shape() -> None:
    cache = new_cache(4, 5, capacity=20)
    place = cache.keys.data_ptr()
    cache.begin(1, 20)
    assert cache.keys.shape == (DEPTH, 1, HEADS, 20, WIDTH) and cache.keys.data_ptr() == place
    assert cache.length == 0
    with pytest.raises(ValueError, match="3 rows of 7"):
        cache.begin(3, 7)


@pytest.mark.parametrize("branches", [1, 2])
def test_slots_bring_images_back_in_any_company(branches: int) -> None:
    cache = new_cache(3 * branches, 6)
    fill(cache, 4, seed=0)
    keys, values = cache.keys[..., :4, :].clone(), cache.values[..., :4, :].clone()
    store = SlotStore(like=cache, slots=5, branches=2, tokens=6)
    store.store([4, 0], cache, [0, 2], branches=branches)
    cache.begin(3 * branches, 6)
    fill(cache, 4, seed=50)
    store.store([2], cache, [1], branches=branches)
    other = cache.keys[..., :4, :].clone()
    store.load([0, 2, 4], cache, branches=branches, length=4, num_tokens=6)
    assert cache.num_rows == 3 * branches and cache.length == 4
    for branch in range(branches):
        first = 3 * branch
        assert torch.equal(cache.keys[:, first, :, :4], keys[:, first + 2])
        assert torch.equal(cache.keys[:, first + 1, :, :4], other[:, first + 1])
        assert torch.equal(cache.keys[:, first + 2, :, :4], keys[:, first])
        assert torch.equal(cache.values[:, first, :, :4], values[:, first + 2])


def test_guided_images_can_go_on_without_their_unconditional_branch() -> None:
    cache = new_cache(4, 6)
    fill(cache, 4, seed=0)
    keys = cache.keys[..., :4, :].clone()
    store = SlotStore(like=cache, slots=2, branches=2, tokens=6)
    store.store([0, 1], cache, [0, 1], branches=2)
    store.load([1], cache, branches=1, length=4, num_tokens=6)
    assert cache.num_rows == 1 and torch.equal(cache.keys[:, 0, :, :4], keys[:, 1])
