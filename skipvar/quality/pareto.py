"""The Pareto plot: what each policy costs and keeps, and the hull that mixtures of fixed strategies reach."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipvar.quality.evaluate import best_value


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """`pareto.svg` and `pareto.png`, a panel for each prompt set. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4.5), squeeze=False, sharey=True)
    for panel, name in zip(panels[0], names, strict=True):
        some = [row for row in rows if row["set"] == name]
        fixed = [(row["token_forwards_share"], row["mean_ssim"]) for row in some if row["is_fixed"]]
        low, high = min(cost for cost, _ in fixed), max(cost for cost, _ in fixed)
        costs = [low + (high - low) * step / 200 for step in range(201)]
        panel.plot(
            costs, [best_value(fixed, cost) for cost in costs], color="0.6", label="mixtures of fixed strategies"
        )
        for row in some:
            at = (row["token_forwards_share"], row["mean_ssim"])
            panel.plot(*at, "o" if row["is_fixed"] else "D", color="0.4" if row["is_fixed"] else "tab:red")
            panel.annotate(row["policy"], at, textcoords="offset points", xytext=(4, -8), fontsize=7)
        panel.set_title(f"{name} ({some[0]['images']} prompts)")
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
