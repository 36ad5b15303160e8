"""What `jobs.evaluate` shows of its scores: a table, JSON, every image's row, and the Pareto plot."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from skipvar.quality.evaluate import Score
from skipvar.skip.tally import best_value

PAPER_TABLE = (
    ("SkipVAR, paper, SSIM 0.88", 1.58, 0.909),
    ("SkipVAR, paper, SSIM 0.86", 1.70, 0.892),
    ("SkipVAR, paper, SSIM 0.84", 1.81, 0.879),
    ("SkipVAR, paper, its fixed hybrid", 2.62, 0.792),
    ("FastVAR, as the paper measures it", 2.53, 0.692),
)
"""Speed against `base` and mean SSIM that arXiv 2506.08908 reports for Infinity-2B on DrawBench; shown beside ours."""
PAPER_MODEL = "infinity_2b"


def write(folder: Path, scores: Sequence[Score], images: pa.Table, table: str) -> None:
    """`evaluation.md` (what `markdown` gave), `evaluation.json` and `images.parquet`. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.md").write_text(table)
    (folder / "evaluation.json").write_text(json.dumps([score.to_dict() for score in scores], indent=1) + "\n")
    pq.write_table(images, folder / "images.parquet")


def markdown(scores: Sequence[Score], model: str) -> str:
    """A table for each prompt set; the paper's own numbers beneath where the model is its own."""
    lines: list[str] = []
    for name, some in _by_set(scores).items():
        lines += [
            f"## {name}: {some[0].images} prompts, SSIM floor {some[0].floor}",
            "",
            "| policy | SSIM | 5% | under the floor (95%) | PSNR | LPIPS | token-forwards | above hull "
            "| saved at equal misses | batch of 1 | full batches |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_line(score) for score in some),
            "",
        ]
    if model == PAPER_MODEL:
        lines += [
            "Reported by the paper (DrawBench, its own machine):",
            "",
            "| method | speed | SSIM |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {speed:.2f} x | {ssim:.3f} |" for name, speed, ssim in PAPER_TABLE]
    return "\n".join(lines).rstrip() + "\n"


def _line(score: Score) -> str:
    low, high = score.interval
    psnr = "–" if score.mean_psnr is None else f"{score.mean_psnr:.1f} dB"
    lpips = "–" if score.mean_lpips is None else f"{score.mean_lpips:.3f}"
    speed = score.speed
    one, full = ("–", "–") if speed is None else (f"{speed.speedup_one:.2f} x", f"{speed.speedup:.2f} x")
    return (
        f"| {score.policy} | {score.mean_ssim:.3f} | {score.fifth_percentile:.3f} "
        f"| {score.share_under_floor:.1%} ({low:.1%} to {high:.1%}) | {psnr} | {lpips} "
        f"| {score.speedup_token_forwards:.2f} x | {score.above_fixed_hull:+.4f} | {score.saved_at_equal_misses:.1%} "
        f"| {one} | {full} |"
    )


def _by_set(scores: Sequence[Score]) -> dict[str, list[Score]]:
    return {name: [score for score in scores if score.set == name] for name in dict.fromkeys(s.set for s in scores)}


def draw(scores: Sequence[Score], folder: Path) -> list[Path]:
    """`pareto.svg` and `pareto.png`, a panel for each prompt set. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = _by_set(scores)
    figure, panels = pyplot.subplots(1, len(sets), figsize=(5.5 * len(sets), 4.5), squeeze=False, sharey=True)
    for panel, (name, some) in zip(panels[0], sets.items(), strict=True):
        fixed = [(score.token_forwards_share, score.mean_ssim) for score in some if score.is_fixed]
        low, high = min(cost for cost, _ in fixed), max(cost for cost, _ in fixed)
        costs = [low + (high - low) * step / 200 for step in range(201)]
        panel.plot(
            costs, [best_value(fixed, cost) for cost in costs], color="0.6", label="mixtures of fixed strategies"
        )
        for score in some:
            at = (score.token_forwards_share, score.mean_ssim)
            panel.plot(*at, "o" if score.is_fixed else "D", color="0.4" if score.is_fixed else "tab:red")
            panel.annotate(score.policy, at, textcoords="offset points", xytext=(4, -8), fontsize=7)
        panel.set_title(f"{name} ({some[0].images} prompts)")
        panel.set_xlabel("token-forwards over those of base")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean SSIM to base")
    panels[0][0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    paths = [folder / f"pareto.{kind}" for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths
