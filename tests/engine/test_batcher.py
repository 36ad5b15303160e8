"""What runs next: full buckets first, the pool never overflows, nothing is stuck."""

import random
from collections import Counter

import pytest

from skipvar.engine.batcher import Batcher, Bucket, Limits, Stream

STREAM = Stream("square", True)
NAMES = ("base", "skip_1", "skip_2", "uncond_1", "uncond_2", "uncond_3")


def bucket(name: str) -> Bucket:
    return Bucket("square", True, name)


def limits(batch: int = 4, pool: int = 16, max_age: int = 1000) -> Limits:
    return Limits(batch, dict.fromkeys(NAMES, batch), pool, max_age)


def test_waits_for_a_full_batch_unless_flushed() -> None:
    batcher: Batcher[int] = Batcher(limits())
    for item in range(3):
        batcher.add(STREAM, item)
    assert batcher.pick(flush=False) is None and not batcher.can_pick(flush=False)
    batch = batcher.pick(flush=True)
    assert batch is not None and batch.items == [0, 1, 2] and batch.key == STREAM and batch.limit == 4
    assert batcher.num_queued == 0 and batcher.pick(flush=True) is None


def test_full_bucket_goes_before_a_prefix() -> None:
    batcher: Batcher[int] = Batcher(limits())
    for item in range(4):
        batcher.add(STREAM, item)
        batcher.add(bucket("skip_1"), 10 + item)
    batch = batcher.pick(flush=False)
    assert batch is not None and batch.key == bucket("skip_1") and batch.items == [10, 11, 12, 13]


def test_streams_never_mix() -> None:
    batcher: Batcher[int] = Batcher(limits())
    tall = Stream("tall", True)
    for item in range(4):
        batcher.add(STREAM if item % 2 else tall, item)
    keys = [batch.key for batch in iter(lambda: batcher.pick(flush=True), None)]
    assert sorted(map(str, keys)) == sorted(map(str, [STREAM, tall]))


def test_full_pool_runs_the_fullest_bucket_part_full() -> None:
    batcher: Batcher[int] = Batcher(limits(pool=6))
    for item in range(4):
        batcher.add(STREAM, item)
    for item, name in enumerate(["base", "skip_1", "skip_1"]):
        batcher.add(bucket(name), 10 + item)
    batch = batcher.pick(flush=False)
    assert batch is not None and batch.key == bucket("skip_1") and len(batch.items) == 2


def test_an_old_image_does_not_wait_forever() -> None:
    batcher: Batcher[int] = Batcher(limits(max_age=3))
    batcher.add(bucket("uncond_3"), 99)
    for round_ in range(3):
        for item in range(4):
            batcher.add(STREAM, 10 * round_ + item)
        batch = batcher.pick(flush=False)
        assert batch is not None and isinstance(batch.key, Stream)
    batch = batcher.pick(flush=False)
    assert batch is not None and batch.items == [99]


def test_put_back_keeps_the_order_and_a_lower_limit_is_remembered() -> None:
    batcher: Batcher[int] = Batcher(limits())
    for item in range(8):
        batcher.add(STREAM, item)
    batch = batcher.pick(flush=False)
    assert batch is not None
    batcher.put_back(batch)
    batcher.lower_limit(batch.key, 2)
    again = batcher.pick(flush=False)
    assert again is not None and again.items == [0, 1] and batcher.num_queued == 6


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        limits(batch=0)
    with pytest.raises(ValueError, match="pool"):
        limits(batch=8, pool=4)


@pytest.mark.parametrize("seed", range(5))
def test_every_image_runs_once_and_the_pool_holds(seed: int) -> None:
    """A random job: arrivals, decisions, flush at the end. The mean fill stays high although six buckets compete."""
    chance = random.Random(seed)
    batcher: Batcher[int] = Batcher(limits(batch=8, pool=58))
    arrivals, finished, fills = list(range(500)), Counter[int](), []
    while arrivals or batcher.num_queued or batcher.num_waiting:
        for _ in range(chance.randrange(0, 20)):
            if arrivals:
                batcher.add(STREAM, arrivals.pop())
        batch = batcher.pick(flush=not arrivals)
        if batch is None:
            continue
        assert len(batch.items) <= batch.limit
        if isinstance(batch.key, Stream):
            for item in batch.items:
                batcher.add(bucket(chance.choice(NAMES)), item)
            assert batcher.num_waiting <= 58
        else:
            fills.append(len(batch.items) / batch.limit)
            finished.update(batch.items)
    assert finished == Counter(range(500))
    assert sum(fills) / len(fills) > 0.85


@pytest.mark.parametrize("key", [Stream("rare", True), Bucket("rare", True, "base")])
def test_streams_and_buckets_age_alike(key: Stream | Bucket) -> None:
    """A rare aspect ratio does not wait for the end of a night in which full batches of another never stop."""
    batcher: Batcher[int] = Batcher(limits(max_age=3))
    batcher.add(key, 99)
    picked = []
    for round_ in range(5):
        for item in range(8):
            batcher.add(STREAM, 10 * round_ + item)
        batch = batcher.pick(flush=False)
        assert batch is not None
        picked.append(batch.key)
    assert picked.index(key) == 3


def test_of_two_full_streams_the_one_that_waited_longer_goes_first() -> None:
    batcher: Batcher[int] = Batcher(limits())
    tall = Stream("tall", True)
    for item in range(4):
        batcher.add(tall, item)
    keys = []
    for _ in range(3):
        for item in range(8):
            batcher.add(STREAM, item)
        batch = batcher.pick(flush=False)
        assert batch is not None
        keys.append(batch.key)
    assert tall in keys


def test_a_stream_waits_for_room_of_its_own_size() -> None:
    """Not of as many images as all streams hold together."""
    batcher: Batcher[int] = Batcher(limits(pool=4, max_age=1))
    batcher.add(Stream("rare", True), 99)
    for item in range(3):
        batcher.add(STREAM, item)
        batcher.add(bucket("base"), 10 + item)
    batch = batcher.pick(flush=True)
    assert batch is not None and batch.items == [99]


def test_put_back_keeps_the_age() -> None:
    batcher: Batcher[int] = Batcher(limits(max_age=2))
    batcher.add(Stream("rare", True), 99)
    for _ in range(2):
        for item in range(4):
            batcher.add(STREAM, item)
        assert batcher.pick(flush=False) is not None
    batch = batcher.pick(flush=False)
    assert batch is not None and batch.items == [99]
    batcher.put_back(batch)
    assert batcher.pick(flush=False) == batch
