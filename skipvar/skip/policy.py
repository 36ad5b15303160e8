"""Policies: from an image's probe to its strategy."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from skipvar.model.device import Dtype
from skipvar.skip.chances import ChanceTable
from skipvar.skip.features import DecodedProbe, ProbeRule
from skipvar.skip.strategy import PAPER_STRATEGIES, STRATEGY_NAMES
from skipvar.types import Request

DEFAULT_PROBE = DecodedProbe(grid_scale=4)
"""The reference's, unless a policy file says otherwise."""
TRIALS = "trials"
"""The policy of a run that makes trials: every image under every strategy (`Image.trial`), and `base`'s is kept."""


@dataclass(frozen=True)
class Decision:
    """What a policy says of one image."""

    strategy: str
    scores: Mapping[str, float] | None = None
    """A probability for each strategy, where the policy has them."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Names each image's strategy after the decision scale. As it stands: the one that is known, or `base`."""

    name: str
    """As users see it: in a dataset's rows, in records and in messages."""
    content_hash: str
    """Of all that the policy's decisions depend on: part of the run's fingerprint."""
    decision_scale: int | None
    """Index of the scale after which it decides; None: the schedule has no room for that, everything is `base`."""
    strategies: tuple[str, ...] = STRATEGY_NAMES
    """Those that it may choose."""
    known_strategy: str | None = None
    """The strategy of every image, where it is known before the image starts."""
    probe: ProbeRule = DEFAULT_PROBE
    """What it decides by."""

    def decide(self, request: Request, numbers: Sequence[float]) -> Decision:  # noqa: ARG002
        """`numbers`: what `probe` names, of the request's image."""
        return Decision(self.known_strategy or "base")


@dataclass(frozen=True, kw_only=True)
class SpreadPolicy(Policy):
    """A strategy by hash of the image's id, over all ten: for tests and benchmarks of grouping."""

    def decide(self, request: Request, numbers: Sequence[float]) -> Decision:  # noqa: ARG002
        digest = hashlib.sha256(request.id.encode()).digest()
        return Decision(STRATEGY_NAMES[int.from_bytes(digest[:8], "big") % len(STRATEGY_NAMES)])


@dataclass(frozen=True)
class LogisticStage:
    """Multinomial logistic regression on the standardised probe: `softmax(((f - mean) / scale) coefᵀ + intercept)`."""

    classes: tuple[int, ...]
    coef: tuple[tuple[float, ...], ...]
    intercept: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def probabilities(self, features: Sequence[float]) -> dict[int, float]:
        """Of each class; they sum to one. Features in the file's order: Sobel change, FFT ratio."""
        z = [(value - mean) / scale for value, mean, scale in zip(features, self.mean, self.scale, strict=True)]
        scores = [
            sum(weight * value for weight, value in zip(row, z, strict=True)) + offset
            for row, offset in zip(self.coef, self.intercept, strict=True)
        ]
        highest = max(scores)
        exponentials = [math.exp(score - highest) for score in scores]
        return {label: value / sum(exponentials) for label, value in zip(self.classes, exponentials, strict=True)}


@dataclass(frozen=True, kw_only=True)
class LogisticPolicy(Policy):
    """The paper's two stages: how many scales to skip; where none, in how many to drop the unconditional branch."""

    skip: LogisticStage
    uncond: LogisticStage
    strategies: tuple[str, ...] = PAPER_STRATEGIES

    def decide(self, request: Request, numbers: Sequence[float]) -> Decision:  # noqa: ARG002
        return self.choose(numbers)

    def choose(self, numbers: Sequence[float]) -> Decision:
        """The arg max of the first stage; where that is to skip nothing, of the second."""
        skip, uncond = self.skip.probabilities(numbers), self.uncond.probabilities(numbers)
        scores = {f"skip_{count}": share for count, share in skip.items() if count}
        scores |= {f"uncond_{count}" if count else "base": skip.get(0, 0.0) * share for count, share in uncond.items()}
        num_skipped, num_conditional = max(skip, key=skip.__getitem__), max(uncond, key=uncond.__getitem__)
        if num_skipped:
            return Decision(f"skip_{num_skipped}", scores)
        return Decision(f"uncond_{num_conditional}" if num_conditional else "base", scores)


@dataclass(frozen=True)
class Promise:
    """At most a share of images falls below an SSIM floor; tested, or watched over, at an error level."""

    floor: float
    alpha: float
    """The share, in (0, 1)."""
    delta: float
    """The chance of a wrong verdict, in (0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a run's images depend on besides weights, prompts and seeds: a promise holds under those it was tested with.

    The fields bear their names in a configuration and in a policy file's `fitted_for`.
    """

    cfg: tuple[float, ...]
    """Of each scale, where a row has none; as `tau`."""
    tau: tuple[float, ...]
    top_k: int
    top_p: float
    negative_prompt: str | None
    cfg_insertion_layers: tuple[int, ...]
    dtype: Dtype
    grids: tuple[tuple[int, int], ...] | None
    """The schedule of the run's aspect ratio and size; None: the model lacks the ratio."""

    def differences(self, other: "Conditions") -> Iterator[tuple[str, Any, Any]]:
        """What is not the same there: its name, and both values."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if one.name in ("cfg", "tau"):
                is_same = are_close(mine, theirs)
            elif one.name == "top_p":
                is_same = are_close((mine,), (theirs,))
            elif one.name == "top_k":
                is_same = (mine == 1) == (theirs == 1)  # no other value has an effect on binary codes
            else:
                is_same = mine == theirs
            if not is_same:
                yield one.name, mine, theirs


@dataclass(frozen=True, kw_only=True)
class CertifiedPolicy(Policy):
    """The cheapest strategy whose chance of staying above an SSIM floor passes a tested threshold; else `base`."""

    table: ChanceTable
    tested_with: Conditions
    aspect_ratio: float
    promise: Promise

    def decide(self, request: Request, numbers: Sequence[float]) -> Decision:
        """`base` where the row has settings of its own that are not those of the test; else the table's choice."""
        own = replace(self.tested_with, cfg=request.cfg, tau=request.tau, negative_prompt=request.negative_prompt)
        has_same_ratio = are_close((request.aspect_ratio,), (self.aspect_ratio,))
        if not has_same_ratio or any(self.tested_with.differences(own)):
            return Decision("base")
        return Decision(*self.table.choose(numbers))


def are_close(values: Sequence[float], others: Sequence[float]) -> bool:
    """The same numbers, as float32 tells them apart."""
    return len(values) == len(others) and all(
        math.isclose(value, other, rel_tol=1e-6) for value, other in zip(values, others, strict=True)
    )
