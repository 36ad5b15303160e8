"""Parity of what needs no weights: schedules, RoPE, the decision table."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from skipvar.model.rope import rope_table, stretched_positions
from skipvar.model.schedules import find_schedule
from skipvar.parity.case import Case, Check
from skipvar.parity.golden import SCHEDULES, GoldenFolder, read_grids
from skipvar.skip.policy import LogisticPolicy

ROPE_TOLERANCE = 1e-4
"""Absolute, on cosines and sines: a position counts up to 110 radians, of which float32 knows 1e-5."""


def table_checks(golden: GoldenFolder) -> Iterator[tuple[str, Check]]:
    """The cases of the folder itself."""
    for ratio, schedule in golden.json("schedules.json").items():
        yield f"schedules/{ratio}", partial(_check_schedule, ratio=ratio, schedule=schedule)
    for ratio, content in golden.json("rope.json").items():
        yield f"rope/{ratio}", partial(_check_rope, golden=golden, ratio=ratio, content=content)
    table = golden.json("decision_models.json").get("golden_table", {})
    for model in table.get("predictions", {}):
        yield f"decisions/{model}", partial(_check_decisions, golden=golden, table=table, model=model)


def _check_schedule(case: Case, ratio: str, schedule: list[list[int]]) -> None:
    ours, grids = find_schedule(SCHEDULES, float(ratio), None), read_grids(schedule)
    case.expect_equal("ratio", ours.ratio, ratio)
    case.expect_equal("grids", ours.grids, grids)
    case.count("scales", len(grids))


def _check_rope(case: Case, golden: GoldenFolder, ratio: str, content: Mapping[str, Any]) -> None:
    tensors = load_file(golden.folder / "rope.safetensors")
    schedule = find_schedule(SCHEDULES, float(ratio), None)
    case.expect_equal("grids", schedule.grids, read_grids(content["schedule_1M"]))
    case.expect_equal("tokens", schedule.first_token(schedule.num_scales), content["tokens"])
    if f"positions_{ratio}" in tensors:
        axes = zip(*(stretched_positions(grid, schedule.reference_grid) for grid in schedule.grids), strict=True)
        positions = torch.stack([torch.cat(axis) for axis in axes], dim=1)
        case.expect_equal("positions", torch.equal(positions, tensors[f"positions_{ratio}"].float()), True)
        case.count("positions", len(positions))
    for name in tensors:
        kind, _, rest = name.partition("_hd")
        width, _, of_ratio = rest.partition("_")
        if kind in ("cos", "sin") and of_ratio == ratio:
            table = rope_table(schedule, int(width))[kind == "sin"]
            case.compare("rope_error", table[tensors[f"rows_{ratio}"].long()], tensors[name], ROPE_TOLERANCE)


def reference_name(strategy: str) -> str:
    """The reference's name of one of our strategies."""
    return strategy.replace("_", "")


def decide(policy: LogisticPolicy, sobel_change: float, fft_ratio: float) -> str:
    """A decision under the reference's name."""
    return reference_name(policy.choose((sobel_change, fft_ratio)).strategy)


def _check_decisions(case: Case, golden: GoldenFolder, table: Mapping[str, Any], model: str) -> None:
    policy, predictions = golden.policies[model], table["predictions"][model]
    for row, features in enumerate(table["features"]):
        case.expect_equal(f"strategy of row {row}", decide(policy, *features), predictions["strategy"][row])
        for stage in ("skip", "uncond"):
            shares = getattr(policy, stage).probabilities(features)
            if stage in predictions:
                label = max(shares, key=shares.__getitem__)
                case.expect_equal(f"{stage} of row {row}", label, predictions[stage][row])
    case.count("decisions", len(table["features"]))
