"""What an engine did: counts and seconds, added up as it runs."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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

    def add(self, other: "BatchCount") -> None:
        self.batches += other.batches
        self.images += other.images
        self.capacity += other.capacity

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fill": round(self.fill, 4)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "BatchCount":
        """What `to_dict` told."""
        return cls(content["batches"], content["images"], content["capacity"])


@dataclass
class EngineStatistics:
    """Of one engine since it was built. `to_dict` is JSON-able."""

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
        total = BatchCount()
        for count in self.suffix.values():
            total.add(count)
        return total.fill

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the fills worked out."""
        return {
            "images": self.images,
            "failures": self.failures,
            "prefix": self.prefix.to_dict(),
            "suffix": {name: count.to_dict() for name, count in sorted(self.suffix.items())},
            "suffix_fill": round(self.suffix_fill, 4),
            "whole": {name: count.to_dict() for name, count in sorted(self.whole.items())},
            "token_forwards_run": self.token_forwards_run,
            "token_forwards_saved": self.token_forwards_saved,
            "out_of_memory": self.out_of_memory,
            "seconds": {name: round(value, 3) for name, value in sorted(self.seconds.items())},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EngineStatistics":
        """What `to_dict` told. KeyError or TypeError for anything else."""
        told = cls(**{name: content[name] for name in _SUMS}, prefix=BatchCount.from_dict(content["prefix"]))
        told.suffix.update({name: BatchCount.from_dict(count) for name, count in content["suffix"].items()})
        told.whole.update({name: BatchCount.from_dict(count) for name, count in content["whole"].items()})
        told.seconds.update(content["seconds"])
        return told

    def add(self, other: "EngineStatistics") -> None:
        """What another engine did, too."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.prefix.add(other.prefix)
        for into, counts in ((self.suffix, other.suffix), (self.whole, other.whole)):
            for strategy, count in counts.items():
                into[strategy].add(count)
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds


_SUMS = ("images", "failures", "token_forwards_run", "token_forwards_saved", "out_of_memory")
