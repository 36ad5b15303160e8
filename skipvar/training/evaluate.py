"""Measures an embedded model on held-out prompts: fidelity, sharpness, and what skipping takes away.

`python -m jobs.train_emoji evaluate` calls it.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from skipvar.engine.sampler import SamplingRules
from skipvar.engine.trials import TrialImages, make_trials
from skipvar.model.pipeline import Pipeline, load_folder
from skipvar.quality.similarity import ssim
from skipvar.report.sheet import Picture, draw_sheet
from skipvar.shards.encode import encode_image
from skipvar.skip.calibration import TrialScores, rank_correlations
from skipvar.skip.features import LatentProbe
from skipvar.skip.fitting import fit_forecasts, foretold_ranks
from skipvar.training.backgrounds import BACKGROUNDS, PATTERNS
from skipvar.training.common import Folders
from skipvar.training.data import LAYOUT_SIDES, Combination, Pictures, split_combinations, to_pixels
from skipvar.training.export import load_exported_autoencoder
from skipvar.training.judge import Judge, Prompt, make_prompts, measure_fidelity
from skipvar.training.parallel import CPU
from skipvar.training.recipe import NUM_SCALES, EvaluationRecipe, Recipe
from skipvar.training.vae import Autoencoder, measure_psnr, reconstruct
from skipvar.types import Request

logger = logging.getLogger(__name__)

SHEET_IMAGES = 24
SKIPPING_PROMPTS = 12
FORETOLD_SIDE = 2
"""Cells a side of the latents that `spearman_latents` is foretold from: more of them need more trials than these."""
EVALUATED = ("base", "skip_1", "skip_2", "skip_3")


def evaluate(recipe: Recipe, folders: Folders, model: Path) -> dict[str, object]:
    """Every number that the exported folder `model` is judged by.

    Also draws `samples.png` (the first held-out prompts, by index) and `skipping.png` (some of them under `EVALUATED`)
    into the model's folder.
    """
    settings = recipe.evaluation
    pictures = Pictures(folders.packages, recipe.image_side, CPU)
    _, held_out = split_combinations(recipe)
    autoencoder = load_exported_autoencoder(model)
    scores: dict[str, object] = {
        f"psnr_{name}": round(measure_psnr(autoencoder, pictures, held_out, layout, settings.num_prompts), 3)
        for layout, name in enumerate(("single", "four", "grid"))
    }
    scores["ssim_truncated"] = _measure_truncation(autoencoder, pictures, held_out[: settings.num_prompts])
    logger.info("%s", scores)
    prompts = make_prompts(held_out, settings.num_prompts)
    trials = list(_make_trials(load_folder(model, torch.float32, torch.device("cpu")), prompts, settings))
    judge = Judge(pictures)
    for name in EVALUATED:
        pixels = torch.from_numpy(np.stack([trial.pixels[name] for trial in trials]))
        shares = measure_fidelity(pixels.permute(0, 3, 1, 2) / 127.5 - 1, prompts, judge)
        fidelity = {key: round(share, 4) for key, share in shares.items()}
        logger.info("%s %s", name, fidelity)
        if name == "base":
            scores |= fidelity
    by_strategy = {name: _similarity(trials, name) for name in EVALUATED}
    scores |= _measure_skipping(trials, prompts, by_strategy, settings)
    _draw_sheets(model, trials, by_strategy)
    return {"num_prompts": len(prompts), **scores}


def _measure_truncation(
    autoencoder: Autoencoder, pictures: Pictures, combinations: list[Combination]
) -> dict[str, list[float]]:
    """Mean SSIM of reconstructions without the last one, two, three scales to the full ones, by pattern.

    Needs no transformer, and foretells what the skip strategies will cost.
    """
    result = {}
    for pattern, chosen in _by_pattern(combinations).items():
        images = pictures.compose([combinations[i] for i in chosen])
        full, *shorter = (to_pixels(reconstruct(autoencoder, images, NUM_SCALES - dropped)) for dropped in range(4))
        result[pattern] = [round(float(ssim(pixels, full).mean()), 4) for pixels in shorter]
    return result


def _by_pattern(combinations: list[Combination]) -> dict[str, list[int]]:
    """Positions in the list by the background's pattern; patterns without any are left out."""
    found: dict[str, list[int]] = {pattern: [] for pattern in PATTERNS}
    for position, combination in enumerate(combinations):
        found[BACKGROUNDS[combination.background_index].pattern].append(position)
    return {pattern: positions for pattern, positions in found.items() if positions}


def _make_trials(pipeline: Pipeline, prompts: list[Prompt], settings: EvaluationRecipe) -> Iterator[TrialImages]:
    """Each prompt's image under `EVALUATED`, from the same bits."""
    num_scales = pipeline.schedule(1.0, None).num_scales
    requests = [
        Request(
            position=position,
            image_index=0,
            id=str(position),
            prompt=prompt.text,
            negative_prompt=None,
            seed=prompt.seed,
            cfg=(settings.cfg,) * num_scales,
            tau=(settings.tau,) * num_scales,
            top_k=settings.top_k,
            top_p=settings.top_p,
            aspect_ratio=1.0,
        )
        for position, prompt in enumerate(prompts)
    ]
    made = make_trials(pipeline, SamplingRules(), requests, settings.probe_scales, settings.batch_size, EVALUATED)
    return tqdm(made, total=len(requests), unit="image")


def _similarity(trials: list[TrialImages], strategy: str) -> np.ndarray:
    """SSIM to base of each trial's image under a strategy, float64 `(trials,)`."""
    images, references = (np.stack([trial.pixels[name] for trial in trials]) for name in (strategy, "base"))
    return ssim(images, references).astype(np.float64)


def _measure_skipping(
    trials: list[TrialImages], prompts: list[Prompt], by_strategy: dict[str, np.ndarray], settings: EvaluationRecipe
) -> dict[str, object]:
    """SSIM to base of skip_1, skip_2, skip_3 (means, medians, 5th and 95th percentiles, medians by layout and by
    pattern) and its rank correlation with the probe.

    `spearman_sobel` and `spearman_fft` are those with skip_3, on the grid of the recipe's `policy_scale`;
    `spearman_latents` with what latents of `FORETOLD_SIDE` cells a side foretell of each strategy, on held-out prompts.
    """
    skipping = np.stack([by_strategy[name] for name in EVALUATED[1:]])
    combinations = [prompt.combination for prompt in prompts]
    layouts = np.array([combination.layout_index for combination in combinations])
    result: dict[str, object] = {
        "ssim_skip": skipping.mean(axis=1).round(4).tolist(),
        "ssim_skip_median": np.median(skipping, axis=1).round(4).tolist(),
        "spread": np.percentile(skipping, (5, 95), axis=1).T.round(4).tolist(),
        "ssim_skip_by_background": {
            pattern: np.median(skipping[:, chosen], axis=1).round(4).tolist()
            for pattern, chosen in _by_pattern(combinations).items()
        },
    }
    for index in np.unique(layouts):
        side = LAYOUT_SIDES[index]
        result[f"ssim_skip_of_{side * side}"] = np.median(skipping[:, layouts == index], axis=1).round(4).tolist()
    known = [
        TrialScores(
            trial.probes,
            {name: float(values[i]) for name, values in by_strategy.items()},
            prompt=trial.request.prompt,
            latents=trial.latents,
        )
        for i, trial in enumerate(trials)
    ]
    foretold = foretold_ranks(fit_forecasts(known, EVALUATED[1:], LatentProbe(FORETOLD_SIDE)), known)
    by_name = {"spearman_latents": list(foretold.values())}
    for scale in settings.probe_scales:
        by_name |= {f"{name}_at_scale_{scale}": values for name, values in rank_correlations(known, scale).items()}
    # Of one prompt, or of values that are all equal, there is no correlation; JSON knows no NaN.
    correlations = {
        name: [None if math.isnan(value) else value for value in values] for name, values in by_name.items()
    }
    reported = ("spearman_sobel", "spearman_fft")
    return {
        **result,
        **correlations,
        **{name: correlations[f"{name}_at_scale_{settings.policy_scale}"][-1] for name in reported},
    }


def _draw_sheets(model: Path, trials: list[TrialImages], by_strategy: dict[str, np.ndarray]) -> None:
    shown = [
        Picture(encode_image(trial.pixels["base"], "png"), trial.request.prompt, "base")
        for trial in trials[:SHEET_IMAGES]
    ]
    (model / "samples.png").write_bytes(draw_sheet(shown))
    compared = [
        Picture(encode_image(trial.pixels[name], "png"), trial.request.prompt, f"{name}: {by_strategy[name][i]:.2f}")
        for i, trial in enumerate(trials[:SKIPPING_PROMPTS])
        for name in EVALUATED
    ]
    (model / "skipping.png").write_bytes(draw_sheet(compared))
