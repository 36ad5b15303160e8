"""Audits: which images of a run are measured against `base`, and what they say together.

The alarm is an e-process for "at most a share alpha of images falls below the floor": a mixture of constant bets
(Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", arXiv 2010.09686, section 4).
Betting that the share is p multiplies the wealth by p / alpha for a miss and by (1 - p) / (1 - alpha) else; while the
share is at most alpha no bet with p > alpha gains on average, so the wealth of all of them together ever reaches
1 / delta with a chance of at most delta (Ville). For a finite mixture the wealth depends on two counts alone. Who
counts, in which order, and acts on the alarm, is `skipvar.quality.audit_book`.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from skipvar.types import Request

_NUM_BETS = 64
_Z95 = 1.959964


def is_audited(request: Request, fraction: float) -> bool:
    """Whether an image is drawn, by a hash of its request: nobody can choose, and a resumed run draws the same."""
    digest = hashlib.sha256(f"audit|{request.position}|{request.image_index}|{request.seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def wealth(images: int, misses: int, alpha: float) -> float:
    """The e-process after so many audited images; at least 1 / delta is an alarm at level delta. 1 before the first."""
    bets = [alpha + (1 - alpha) * (place + 0.5) / _NUM_BETS for place in range(_NUM_BETS)]
    logs = [misses * math.log(bet / alpha) + (images - misses) * math.log((1 - bet) / (1 - alpha)) for bet in bets]
    highest = max(logs)
    log_wealth = highest + math.log(sum(math.exp(value - highest) for value in logs) / len(logs))
    return math.exp(min(log_wealth, 700.0))


def share_interval(misses: int, images: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; (0, 1) where there is no image."""
    if images == 0:
        return 0.0, 1.0
    share, square = misses / images, _Z95**2
    middle = share + square / (2 * images)
    half = _Z95 * math.sqrt(share * (1 - share) / images + square / (4 * images**2))
    low, high = (middle - half) / (1 + square / images), (middle + half) / (1 + square / images)
    return (0.0 if misses == 0 else low), (1.0 if misses == images else high)


@dataclass(frozen=True)
class AuditResult:
    """What the audited images of a run say; JSON-able by `asdict`."""

    images: int
    mean_ssim: float | None
    """None where no image was audited; so are the next two."""
    mean_interval: tuple[float, float] | None
    """95%, of the mean, by its standard error."""
    fifth_percentile: float | None
    floor: float | None
    misses: int
    """Audited images under the floor; 0 where there is no floor."""
    interval: tuple[float, float]
    """95%, of the share under the floor."""

    @property
    def share(self) -> float:
        """Of audited images under the floor."""
        return self.misses / self.images if self.images else 0.0

    def text(self) -> str:
        """For a person, in one line."""
        if self.mean_ssim is None or self.mean_interval is None:
            return "no image was audited"
        low, high = self.mean_interval
        said = (
            f"{self.images} images re-made under base: mean SSIM {self.mean_ssim:.3f} (95%: {low:.3f} to {high:.3f}), "
            f"5th percentile {self.fifth_percentile:.3f}"
        )
        if self.floor is None:
            return said
        ends = " to ".join(f"{100 * end:.1f}" for end in self.interval)
        return f"{said}, {100 * self.share:.1f}% under {self.floor:g} (95%: {ends}%)"


def summarize(scores: Iterable[float], floor: float | None) -> AuditResult:
    """From the SSIM of each audited image. Without a floor there is no share."""
    values = np.fromiter(scores, float)
    count = len(values)
    misses = 0 if floor is None else int((values < floor).sum())
    mean = float(values.mean()) if count else None
    half = _Z95 * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return AuditResult(
        images=count,
        mean_ssim=mean,
        mean_interval=None if mean is None else (mean - half, min(1.0, mean + half)),
        fifth_percentile=float(np.percentile(values, 5)) if count else None,
        floor=floor,
        misses=misses,
        interval=share_interval(misses, count if floor is not None else 0),
    )
