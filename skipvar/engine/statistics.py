"""What an engine did: counts and seconds, added up as it runs."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BatchCount:
    """Batches of one kind."""

    batches: int = 0
    images: int = 0
    capacity: int = 0
    """Images that full batches would have held."""

    @property
    def fill(self) -> float:
        return self.images / self.capacity if self.capacity else 0.0


@dataclass
class EngineStatistics:
    """Of one engine since it was built. `to_dict` is JSON-able; `merge_statistics` adds up several."""

    images: int = 0
    failures: int = 0
    prefix: BatchCount = field(default_factory=BatchCount)
    suffix: dict[str, BatchCount] = field(default_factory=lambda: defaultdict(BatchCount))
    """By strategy: a suffix batch has one."""
    whole: dict[str, BatchCount] = field(default_factory=lambda: defaultdict(BatchCount))
    """By strategy: batches whose strategy was known before they started."""
    token_forwards_run: int = 0
    token_forwards_saved: int = 0
    """Against `base` for the same images."""
    out_of_memory: int = 0
    """Batches that were halved and run again."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """In text, prefix, probe, suffix (and whole), decode."""

    @property
    def suffix_fill(self) -> float:
        """Mean fill of suffix batches: images over what full batches would have held."""
        images = sum(count.images for count in self.suffix.values())
        capacity = sum(count.capacity for count in self.suffix.values())
        return images / capacity if capacity else 0.0

    def count(self, into: BatchCount, num_images: int, limit: int) -> None:
        into.batches += 1
        into.images += num_images
        into.capacity += limit

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the fills worked out."""

        def of(count: BatchCount) -> dict[str, Any]:
            return {
                "batches": count.batches,
                "images": count.images,
                "capacity": count.capacity,
                "fill": round(count.fill, 4),
            }

        return {
            "images": self.images,
            "failures": self.failures,
            "prefix": of(self.prefix),
            "suffix": {name: of(count) for name, count in sorted(self.suffix.items())},
            "suffix_fill": round(self.suffix_fill, 4),
            "whole": {name: of(count) for name, count in sorted(self.whole.items())},
            "token_forwards_run": self.token_forwards_run,
            "token_forwards_saved": self.token_forwards_saved,
            "out_of_memory": self.out_of_memory,
            "seconds": {name: round(value, 3) for name, value in sorted(self.seconds.items())},
        }


def merge_statistics(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several engines' `to_dict`, with the fills worked out anew."""
    total = EngineStatistics()
    for part in parts:
        for name in ("images", "failures", "token_forwards_run", "token_forwards_saved", "out_of_memory"):
            setattr(total, name, getattr(total, name) + part[name])
        _add(total.prefix, part["prefix"])
        for kind, counts in (("suffix", total.suffix), ("whole", total.whole)):
            for strategy, count in part[kind].items():
                _add(counts[strategy], count)
        for name, seconds in part["seconds"].items():
            total.seconds[name] += seconds
    return total.to_dict()


def _add(into: BatchCount, part: dict[str, Any]) -> None:
    into.batches += part["batches"]
    into.images += part["images"]
    into.capacity += part["capacity"]
