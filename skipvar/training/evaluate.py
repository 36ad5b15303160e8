"""Measures an embedded model on held-out prompts: fidelity, sharpness, and what skipping takes away.

`python -m jobs.train_emoji evaluate` calls it.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from skipvar.config import EngineConfig, ModelSection, RunConfig
from skipvar.engine.build import build_engine
from skipvar.engine.trials import TrialRule
from skipvar.errors import ModelError
from skipvar.quality.similarity import psnr, ssim
from skipvar.report.sheet import Picture, draw_sheet
from skipvar.shards.encode import encode_image
from skipvar.skip.calibration import rank_correlations
from skipvar.skip.features import LatentProbe
from skipvar.skip.fitting import fit_forecasts, foretold_ranks
from skipvar.skip.policy import TRIALS
from skipvar.training.backgrounds import BACKGROUNDS, PATTERNS
from skipvar.training.common import Folders
from skipvar.training.data import LAYOUT_SIDES, Combination, Pictures, split_combinations, to_pixels
from skipvar.training.export import load_exported_autoencoder
from skipvar.training.judge import Judge, Prompt, make_prompts, measure_fidelity
from skipvar.training.parallel import CPU
from skipvar.training.recipe import NUM_SCALES, EvaluationRecipe, Recipe
from skipvar.training.vae import Autoencoder, measure_psnr, reconstruct
from skipvar.types import Failure, Request, Trial

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
    trials = _make_trials(model, prompts, settings)
    judge = Judge(pictures)
    for name in EVALUATED:
        pixels = torch.from_numpy(np.stack([trial.pixels[name] for trial in trials]))
        shares = measure_fidelity(pixels.permute(0, 3, 1, 2) / 127.5 - 1, prompts, judge)
        fidelity = {key: round(share, 4) for key, share in shares.items()}
        logger.info("%s %s", name, fidelity)
        if name == "base":
            scores |= fidelity
    by_strategy = {name: np.array([trial.ssim[name] for trial in trials]) for name in EVALUATED}
    scores |= _measure_skipping(trials, prompts, by_strategy, settings)
    _draw_sheets(model, trials, prompts)
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


def _make_trials(model: Path, prompts: list[Prompt], settings: EvaluationRecipe) -> list[Trial]:
    """Each prompt's image under `EVALUATED`, from the same bits."""
    config = RunConfig(
        model=ModelSection(path=str(model), dtype="float32", device="cpu"),
        policy=TRIALS,
        engine=EngineConfig(batch_size=settings.batch_size, batch_invariant=False),
    )
    rule = TrialRule(ssim, psnr, strategies=EVALUATED, grid_scales=settings.probe_scales, keeps_pixels=True)
    engine = build_engine(config, rule=rule)
    engine.submit(
        [
            Request(
                position=position,
                image_index=0,
                id=str(position),
                prompt=prompt.text,
                negative_prompt=None,
                seed=prompt.seed,
                cfg=(settings.cfg,) * NUM_SCALES,
                tau=(settings.tau,) * NUM_SCALES,
                top_k=settings.top_k,
                top_p=settings.top_p,
                aspect_ratio=1.0,
            )
            for position, prompt in enumerate(prompts)
        ]
    )
    trials: dict[int, Trial] = {}
    with tqdm(total=len(prompts), unit="image") as progress:
        while engine.num_pending:
            for image in engine.step(flush=True):
                if isinstance(image, Failure):
                    raise ModelError(f"{model}: {image.message}")
                assert image.trial is not None
                trials[image.request.position] = image.trial
                progress.update()
    return [trials[position] for position in range(len(prompts))]


def _measure_skipping(
    trials: list[Trial], prompts: list[Prompt], by_strategy: dict[str, np.ndarray], settings: EvaluationRecipe
) -> dict[str, object]:
    """SSIM to base, of which `by_strategy` has float64 `(trials,)`, of skip_1, skip_2, skip_3 (means, medians, 5th and
    95th percentiles, medians by layout and by pattern) and its rank correlation with the probe.

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
        Trial(
            probes=trial.probes,
            ssim={name: float(values[i]) for name, values in by_strategy.items()},
            prompt=prompts[i].text,
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


def _draw_sheets(model: Path, trials: list[Trial], prompts: list[Prompt]) -> None:
    shown = [
        Picture(encode_image(trial.pixels["base"], "png"), prompt.text, "base")
        for trial, prompt in zip(trials[:SHEET_IMAGES], prompts, strict=False)
    ]
    (model / "samples.png").write_bytes(draw_sheet(shown))
    compared = [
        Picture(encode_image(trial.pixels[name], "png"), prompt.text, f"{name}: {trial.ssim[name]:.2f}")
        for trial, prompt in zip(trials[:SKIPPING_PROMPTS], prompts, strict=False)
        for name in EVALUATED
    ]
    (model / "skipping.png").write_bytes(draw_sheet(compared))
