"""What runs next. Plain Python over counts and ages: no torch, no model.

An image goes through two queues: a **stream** before its prefix (images that can share a prefix batch), and, where a
policy has to look at it first, a **bucket** before its suffix (images that share a skip pattern as well).
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
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


Key = Stream | Bucket


@dataclass(frozen=True)
class Limits:
    """Largest batches, and how many images may wait in buckets with their keys and values."""

    prefix_images: int
    suffix_images: Mapping[str, int]
    """For each strategy: their suffixes cost different amounts of memory."""
    pool_images: int
    max_age: int = 256
    """A queue whose oldest image has seen so many batches go by runs part full."""

    def __post_init__(self) -> None:
        if self.prefix_images < 1 or min(self.suffix_images.values()) < 1:
            raise ValueError("a batch needs at least one image")
        if self.pool_images < self.prefix_images:
            raise ValueError(f"a pool of {self.pool_images} cannot take a prefix batch of {self.prefix_images}")


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """Images to run together."""

    key: Key
    items: list[Item]
    since: list[int]
    """When each was queued, by the batcher's clock."""
    limit: int
    """How many would have been a full batch."""


@dataclass
class Batcher(Generic[Item]):
    """Queues of images, and the rule by which a batch is picked from them. Its clock counts batches."""

    limits: Limits
    _queues: dict[Key, deque[tuple[int, Item]]] = field(default_factory=dict)
    _clock: int = 0

    @property
    def num_waiting(self) -> int:
        """Images in buckets: each holds a slot."""
        return sum(len(queue) for key, queue in self._queues.items() if isinstance(key, Bucket))

    @property
    def num_queued(self) -> int:
        """Images whose prefix has not run."""
        return sum(len(queue) for key, queue in self._queues.items() if isinstance(key, Stream))

    def add(self, key: Key, item: Item) -> None:
        """Queues an image: in a stream for its prefix, or in a bucket for its suffix."""
        self._queues.setdefault(key, deque()).append((self._clock, item))

    def put_back(self, batch: Batch[Item]) -> None:
        """Returns a batch that could not run to the front of its queue, as old as it was."""
        queue = self._queues.setdefault(batch.key, deque())
        queue.extendleft(reversed(list(zip(batch.since, batch.items, strict=True))))

    def lower_limit(self, key: Key, num_images: int) -> None:
        """Remembers that larger batches of this kind do not fit."""
        if isinstance(key, Stream):
            self.limits = replace(self.limits, prefix_images=num_images)
        else:
            self.limits = replace(self.limits, suffix_images={**self.limits.suffix_images, key.strategy: num_images})

    def can_pick(self, *, flush: bool) -> bool:
        return self._choose(flush) is not None

    def pick(self, *, flush: bool) -> Batch[Item] | None:
        """The next batch; None: wait for more images. `flush`: no more are to come for now."""
        key = self._choose(flush)
        if key is None:
            return None
        self._clock += 1
        queue, limit = self._queues[key], self._limit(key)
        taken = [queue.popleft() for _ in range(min(limit, len(queue)))]
        if not queue:
            del self._queues[key]
        return Batch(key, items=[item for _, item in taken], since=[since for since, _ in taken], limit=limit)

    def _choose(self, flush: bool) -> Key | None:
        """The one rule for full and part-full batches; among equals, whose first image was queued first:

        1. a full bucket: it frees memory and wastes nothing;
        2. a part-full stream or bucket whose first image has waited too long: full streams may never end;
        3. a full stream;
        4. only with `flush`: a part-full stream, then the fullest bucket.

        Where the pool has no room for the stream's batch, the fullest bucket runs in its place.
        """
        full = [key for key in self._queues if len(self._queues[key]) >= self._limit(key)]
        late = [key for key in self._queues if key not in full and self._age(key) >= self.limits.max_age]
        key = (
            self._oldest(key for key in full if isinstance(key, Bucket))
            or self._oldest(late)
            or self._oldest(full)
            or (self._oldest(key for key in self._queues if isinstance(key, Stream)) if flush else None)
        )
        if key is None:
            return self._fullest_bucket() if flush else None
        return self._fullest_bucket() if isinstance(key, Stream) and not self._has_room(key) else key

    def _age(self, key: Key) -> int:
        """Batches that the first image of a queue has seen go by."""
        return self._clock - self._queues[key][0][0]

    def _oldest(self, keys: Iterable[Key]) -> Key | None:
        return max(keys, key=self._age, default=None)

    def _has_room(self, stream: Stream) -> bool:
        """Whether the pool takes the stream's next batch, should all its images go on waiting."""
        num_next = min(self.limits.prefix_images, len(self._queues[stream]))
        return self.limits.pool_images - self.num_waiting >= num_next

    def _fullest_bucket(self) -> Bucket | None:
        buckets = [key for key in self._queues if isinstance(key, Bucket)]
        return max(buckets, key=lambda key: len(self._queues[key]) / self._limit(key), default=None)

    def _limit(self, key: Key) -> int:
        return self.limits.prefix_images if isinstance(key, Stream) else self.limits.suffix_images[key.strategy]
