"""Parity: every case of a golden folder against our own code, a verdict a case (tests/golden/README.md)."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from skipvar.errors import InputError, SkipvarError
from skipvar.model.rope import rope_table, stretched_positions
from skipvar.model.schedules import find_schedule
from skipvar.parity.case import Case, Check
from skipvar.parity.compare import decide
from skipvar.parity.golden import SCHEDULES, GoldenFolder, read_grids
from skipvar.parity.runs import PartParity

ROPE_TOLERANCE = 1e-4
"""Absolute, on cosines and sines: a position counts up to 110 radians, of which float32 knows 1e-5."""


@dataclass(frozen=True)
class Report:
    """All cases, and those that are only reported."""

    cases: list[Case]
    unjudged: list[Case]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all judged cases passed; the others do not count."""
        return all(case.passed for case in self.cases)

    def summary(self) -> dict[str, Any]:
        """The one JSON document that parity ends with."""
        return {
            **_totals(self.cases),
            "failed": [case.name for case in self.cases if not case.passed],
            "runs_bf16_ca": _totals(self.unjudged),
            "seconds": round(self.seconds, 1),
        }


def _totals(cases: list[Case]) -> dict[str, Any]:
    errors, counts = {"logit_error": 0.0}, Counter[str]()
    for case in cases:
        errors |= {kind: max(value, errors.get(kind, 0.0)) for kind, value in case.errors.items()}
        counts.update(case.counts)  # `+=` would drop those that are zero
    return {
        "cases": len(cases),
        "passed": sum(case.passed for case in cases),
        **{f"worst_{kind}": value for kind, value in errors.items()},
        **{f"num_{what}": number for what, number in counts.items()},
    }


def run_parity(folder: Path, on_case: Callable[[Case], None] | None = None) -> Report:
    """Runs every case of a golden folder and tells `on_case` of each; raises `InputError` for what is not one."""

    def run(checks: Iterable[tuple[str, Check]]) -> list[Case]:
        cases = []
        for name, check in checks:
            case = Case(name)
            try:
                check(case)
            except Exception as error:  # whatever breaks in a case is its verdict: the others go on
                case.problems.append(f"{type(error).__name__}: {str(error)[:300]}")
            if on_case:
                on_case(case)
            cases.append(case)
        return cases

    start = time.perf_counter()
    golden = GoldenFolder(folder)
    unjudged = []
    try:
        cases = run(_table_checks(golden))
        for part in (PartParity(golden, part) for part in golden.parts):
            cases += run(part.judged())
            unjudged += run(part.unjudged())
    except SkipvarError:
        raise
    except Exception as error:  # of listing the cases, whose own are verdicts: what is damaged may raise anything
        raise InputError(f"{folder}: not laid out as golden data ({type(error).__name__}: {error})") from error
    if not cases:
        raise InputError(f"{folder}: a golden folder without a single case")
    return Report(cases, unjudged, time.perf_counter() - start)


def _table_checks(golden: GoldenFolder) -> Iterator[tuple[str, Check]]:
    """The cases of the folder itself, which need no weights: schedules, RoPE, the decision table."""
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
    case.counts["scales"] += len(grids)


def _check_rope(case: Case, golden: GoldenFolder, ratio: str, content: Mapping[str, Any]) -> None:
    tensors = load_file(golden.folder / "rope.safetensors")
    schedule = find_schedule(SCHEDULES, float(ratio), None)
    case.expect_equal("grids", schedule.grids, read_grids(content["schedule_1M"]))
    case.expect_equal("tokens", schedule.first_token(schedule.num_scales), content["tokens"])
    if f"positions_{ratio}" in tensors:
        axes = zip(*(stretched_positions(grid, schedule.reference_grid) for grid in schedule.grids), strict=True)
        positions = torch.stack([torch.cat(axis) for axis in axes], dim=1)
        case.expect_equal("positions", torch.equal(positions, tensors[f"positions_{ratio}"].float()), True)
        case.counts["positions"] += len(positions)
    for name in tensors:
        kind, _, rest = name.partition("_hd")
        width, _, of_ratio = rest.partition("_")
        if kind in ("cos", "sin") and of_ratio == ratio:
            table = rope_table(schedule, int(width))[kind == "sin"]
            case.compare("rope_error", table[tensors[f"rows_{ratio}"].long()], tensors[name], ROPE_TOLERANCE)


def _check_decisions(case: Case, golden: GoldenFolder, table: Mapping[str, Any], model: str) -> None:
    policy, predictions = golden.policies[model], table["predictions"][model]
    for row, features in enumerate(table["features"]):
        case.expect_equal(f"strategy of row {row}", decide(policy, *features), predictions["strategy"][row])
        for stage in ("skip", "uncond"):
            shares = getattr(policy, stage).probabilities(features)
            if stage in predictions:
                label = max(shares, key=shares.__getitem__)
                case.expect_equal(f"{stage} of row {row}", label, predictions[stage][row])
    case.counts["decisions"] += len(table["features"])
