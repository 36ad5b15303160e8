"""Parity: every case of a golden folder against our own code, a verdict a case (tests/golden/README.md)."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipvar.errors import InputError, SkipvarError
from skipvar.parity.case import Case, Check, judge, merge
from skipvar.parity.golden import GoldenFolder
from skipvar.parity.runs import part_checks, unjudged_checks
from skipvar.parity.tables import table_checks


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
    merged = merge(cases)
    errors = {f"worst_{kind}": value for kind, value in merged.errors.items()}
    return {
        "cases": len(cases),
        "passed": sum(case.passed for case in cases),
        "worst_logit_error": errors.pop("worst_logit_error", 0.0),
        **errors,
        **{f"num_{what}": number for what, number in merged.counts.items()},
    }


def run_parity(folder: Path, on_case: Callable[[Case], None] | None = None) -> Report:
    """Runs every case of a golden folder and tells `on_case` of each; raises `InputError` for what is not one."""

    def run(checks: Iterable[tuple[str, Check]]) -> list[Case]:
        cases = []
        for name, check in checks:
            cases.append(judge(name, check))
            if on_case:
                on_case(cases[-1])
        return cases

    start = time.perf_counter()
    golden = GoldenFolder(folder)
    unjudged = []
    try:
        cases = run(table_checks(golden))
        for part in golden.parts:
            cases += run(part_checks(golden, part))
            unjudged += run(unjudged_checks(golden, part))
    except SkipvarError:
        raise
    except Exception as error:  # of listing the cases, whose own are verdicts: what is damaged may raise anything
        raise InputError(f"{folder}: not laid out as golden data ({type(error).__name__}: {error})") from error
    if not cases:
        raise InputError(f"{folder}: a golden folder without a single case")
    return Report(cases, unjudged, time.perf_counter() - start)
