"""Fits what certified policies foretell: each strategy's SSIM from the probe, by ridge regression.

One regression serves every floor, and it learns from how far an SSIM is from the floor, not only from which side it is
on. Which probe it looks at is chosen by what it foretells on held-out prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from skipvar.skip.chances import Forecast, Scaling, loss_exponent
from skipvar.skip.features import LATENT_SIDES, DecodedProbe, LatentProbe, ProbeRule
from skipvar.types import Trial

_FOLDS = 4
_PENALTIES = np.logspace(0, 4, 13)
_MIN_SPREAD = 1e-2
"""In units of `loss_exponent`: where nothing is left open on the trials, something may be elsewhere."""


@dataclass(frozen=True)
class Fit:
    """Forecasts of one probe, and how good they are on prompts that they were not fitted to."""

    rule: ProbeRule
    scaling: Scaling
    forecasts: Mapping[str, Forecast]
    """By strategy, in the order that was asked for."""
    held_out: np.ndarray
    """`(trials, strategies)` float64: the foretold mean of `loss_exponent` of each trial, by the other folds."""


def fit_forecasts(trials: Sequence[Trial], strategies: Sequence[str], rule: ProbeRule) -> Fit:
    """A forecast for each of the strategies. The ridge penalty of each is chosen by leave-one-out errors."""
    x = np.array([rule.numbers(trial) for trial in trials])
    deviation = x.std(axis=0)
    deviation[deviation == 0] = 1.0  # a number that never varies says nothing; dividing by it would
    scaling = Scaling(_floats(x.mean(axis=0)), _floats(deviation))
    terms = np.array([scaling.terms(row) for row in x.tolist()])
    targets = np.array([[loss_exponent(trial.ssim[name]) for name in strategies] for trial in trials])
    held_out = np.empty_like(targets)
    folds = _folds(trials)
    for fold in set(folds.tolist()):
        away = folds == fold
        weights, offsets = _ridge(terms[~away], targets[~away]) if not away.all() else _constant(terms, targets)
        held_out[away] = terms[away] @ weights.T + offsets
    spreads = np.maximum(np.sqrt(np.square(targets - held_out).mean(axis=0)), _MIN_SPREAD)
    weights, offsets = _ridge(terms, targets)
    forecasts = {
        name: Forecast(_floats(weights[place]), float(offsets[place]), float(spreads[place]))
        for place, name in enumerate(strategies)
    }
    return Fit(rule, scaling, forecasts, held_out)


def _ridge(terms: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(strategies, terms)` and intercepts `(strategies,)`."""
    from sklearn.linear_model import RidgeCV

    if len(terms) < 3:
        return _constant(terms, targets)
    model = RidgeCV(_PENALTIES, alpha_per_target=True).fit(terms, targets)
    return model.coef_, model.intercept_


def _constant(terms: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, whatever the probe says."""
    return np.zeros((targets.shape[1], terms.shape[1])), targets.mean(axis=0)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    """To seven digits, as a policy file keeps them."""
    return tuple(float(f"{value:.7g}") for value in values)


def _folds(trials: Sequence[Trial]) -> np.ndarray:
    """A fold for each trial, the same for all images of a prompt."""
    places = {prompt: place for place, prompt in enumerate(sorted({trial.prompt for trial in trials}))}
    return np.array([places[trial.prompt] % _FOLDS for trial in trials])


def log_loss(fit: Fit, trials: Sequence[Trial], floor: float) -> float:
    """Mean negative log-probability, over strategies and held-out trials, of what happened at the floor."""
    from scipy.stats import norm

    spreads = np.array([forecast.spread for forecast in fit.forecasts.values()])
    kept = np.array([[trial.ssim[name] >= floor for name in fit.forecasts] for trial in trials])
    chances = norm.sf((loss_exponent(floor) - fit.held_out) / spreads)
    return float(-np.log(np.maximum(np.where(kept, chances, 1 - chances), 1e-6)).mean())


def foretold_ranks(fit: Fit, trials: Sequence[Trial]) -> dict[str, float]:
    """Spearman's correlation of each strategy's SSIM with what was foretold of it on held-out prompts."""
    from scipy.stats import spearmanr

    return {
        name: round(float(spearmanr(fit.held_out[:, place], [trial.ssim[name] for trial in trials]).statistic), 3)
        for place, name in enumerate(fit.forecasts)
    }


def rules_of(trials: Sequence[Trial]) -> list[ProbeRule]:
    """Every probe that these trials can tell."""
    decoded = [DecodedProbe(grid) for grid in sorted(trials[0].probes)]
    return [*decoded, *(LatentProbe(side) for side in LATENT_SIDES if trials[0].latents)]


def choose_probe(trials: Sequence[Trial], floor: float, strategies: Sequence[str]) -> tuple[Fit, dict[str, float]]:
    """The fit of the probe that foretells best, and the held-out log-loss of each by its name."""
    fits = [fit_forecasts(trials, strategies, rule) for rule in rules_of(trials)]
    losses = [log_loss(fit, trials, floor) for fit in fits]
    return fits[int(np.argmin(losses))], {str(fit.rule): loss for fit, loss in zip(fits, losses, strict=True)}
