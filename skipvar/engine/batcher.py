"""What runs next. Plain Python over counts and ages: no torch, no model.

An image goes through two queues: a **stream** before its prefix (images that can share a prefix batch), and, where a
policy has to look at it first, a **bucket** before its suffix (images that share a skip pattern as well).
"""

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class Stream(NamedTuple):
    """What images of one prefix batch have in common."""

    schedule: Hashable
    is_guided: bool


class Bucket(NamedTuple):
    """What images of one suffix batch have in common."""

    schedule: Hashable
    is_guided: bool
    strategy: str


@dataclass(frozen=True)
class Limits:
    """Largest batches, and how many images may wait in buckets with their keys and values."""

    prefix_images: int
    suffix_images: Mapping[str, int]
    """For each strategy: their suffixes cost different amounts of memory."""
    pool_images: int
    max_age: int = 256
    """A bucket whose oldest image has seen so many batches go by runs part full."""

    def __post_init__(self) -> None:
        if self.prefix_images < 1 or min(self.suffix_images.values()) < 1:
            raise ValueError("a batch needs at least one image")
        if self.pool_images < self.prefix_images:
            raise ValueError(f"a pool of {self.pool_images} cannot take a prefix batch of {self.prefix_images}")


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """Images to run together."""

    key: Stream | Bucket
    items: list[Item]
    limit: int
    """How many would have been a full batch."""

    @property
    def is_prefix(self) -> bool:
        return isinstance(self.key, Stream)


@dataclass
class Batcher(Generic[Item]):
    """Queues of images, and the rule by which a batch is picked from them."""

    limits: Limits
    _streams: dict[Stream, deque[Item]] = field(default_factory=dict)
    _buckets: dict[Bucket, deque[tuple[int, Item]]] = field(default_factory=dict)
    _clock: int = 0

    @property
    def num_waiting(self) -> int:
        """Images in buckets: each holds a slot."""
        return sum(len(queue) for queue in self._buckets.values())

    @property
    def num_queued(self) -> int:
        """Images whose prefix has not run."""
        return sum(len(queue) for queue in self._streams.values())

    def add(self, stream: Stream, item: Item) -> None:
        """Queues an image for its prefix."""
        self._streams.setdefault(stream, deque()).append(item)

    def put(self, bucket: Bucket, item: Item) -> None:
        """Queues an image for its suffix."""
        self._buckets.setdefault(bucket, deque()).append((self._clock, item))

    def put_back(self, batch: Batch[Item]) -> None:
        """Returns a batch that could not run to the front of its queue."""
        if isinstance(batch.key, Stream):
            self._streams.setdefault(batch.key, deque()).extendleft(reversed(batch.items))
        else:
            aged = [(self._clock, item) for item in reversed(batch.items)]
            self._buckets.setdefault(batch.key, deque()).extendleft(aged)

    def lower_limit(self, key: Stream | Bucket, num_images: int) -> None:
        """Remembers that larger batches of this kind do not fit."""
        if isinstance(key, Stream):
            self.limits = replace(self.limits, prefix_images=num_images)
        else:
            self.limits = replace(self.limits, suffix_images={**self.limits.suffix_images, key.strategy: num_images})

    def can_pick(self, *, flush: bool) -> bool:
        return self._choose(flush) is not None

    def pick(self, *, flush: bool) -> Batch[Item] | None:
        """The next batch: a full bucket, else an over-aged one, else a prefix batch, else (`flush`, or where the pool
        has no room for the next prefix batch) the fullest bucket. None: wait for more images."""
        key = self._choose(flush)
        if key is None:
            return None
        self._clock += 1
        limit = self._limit(key)
        if isinstance(key, Stream):
            queue = self._streams[key]
            items = [queue.popleft() for _ in range(min(limit, len(queue)))]
            if not queue:
                del self._streams[key]
            return Batch(key, items, limit)
        aged = self._buckets[key]
        items = [aged.popleft()[1] for _ in range(min(limit, len(aged)))]
        if not aged:
            del self._buckets[key]
        return Batch(key, items, limit)

    def _choose(self, flush: bool) -> Stream | Bucket | None:
        oldest_first = sorted(self._buckets, key=lambda key: self._buckets[key][0][0])
        full = [key for key in oldest_first if len(self._buckets[key]) >= self._limit(key)]
        if full:
            return full[0]
        if oldest_first and self._clock - self._buckets[oldest_first[0]][0][0] >= self.limits.max_age:
            return oldest_first[0]
        streams = sorted(self._streams, key=lambda key: len(self._streams[key]), reverse=True)
        ready = [key for key in streams if flush or len(self._streams[key]) >= self.limits.prefix_images]
        if ready:
            has_room = self.limits.pool_images - self.num_waiting >= min(self.limits.prefix_images, self.num_queued)
            return ready[0] if has_room else self._fullest()
        return self._fullest() if flush and self._buckets else None

    def _fullest(self) -> Bucket:
        return max(self._buckets, key=lambda key: len(self._buckets[key]) / self._limit(key))

    def _limit(self, key: Stream | Bucket) -> int:
        return self.limits.prefix_images if isinstance(key, Stream) else self.limits.suffix_images[key.strategy]
