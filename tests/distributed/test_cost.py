"""Money: what replica time costs, and where it ends."""

import pytest

from skipvar.config import BudgetConfig
from skipvar.distributed.metrics import Cost, cost_text
from skipvar.errors import ConfigError, StoppedError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_replica_time_is_paid_and_earlier_sessions_count() -> None:
    clock = Clock()
    cost = Cost(BudgetConfig(usd_per_replica_hour=2.0), usd_before=1.0, clock=clock)
    clock.now = 1800.0
    cost.tick(4)
    clock.now = 3600.0
    cost.tick(0)
    assert cost.replica_seconds == 7200
    assert cost.session_usd == 4.0 and cost.usd == 5.0
    assert cost.to_dict(1000) == {"usd": 5.0, "usd_per_image": 0.004, "replica_seconds": 7200.0}
    assert cost.to_dict(0)["usd_per_image"] is None
    assert cost_text(cost.to_dict(1000)) == "5.00 USD, 0.004 an image" and cost_text(cost.to_dict(0)) == "5.00 USD"


def test_without_a_price_nothing_is_said() -> None:
    cost = Cost(BudgetConfig())
    cost.tick(3)
    assert cost.usd is None and cost_text(cost.to_dict(5)) == "" and cost.to_dict(5)["usd"] is None
    cost.check()


def test_the_end_of_the_budget_stops_in_one_sentence() -> None:
    clock = Clock()
    cost = Cost(BudgetConfig(usd_per_replica_hour=3600.0, max_usd=10.0), usd_before=4.0, clock=clock)
    clock.now = 5.0
    cost.tick(1)
    cost.check()
    clock.now = 6.0
    cost.tick(1)
    with pytest.raises(StoppedError, match=r"10\.00 USD of budget.max_usd \(10\)"):
        cost.check()


@pytest.mark.parametrize("budget", [{"max_usd": 5.0}, {"usd_per_replica_hour": -1.0}, {"usd_per_replica_hour": 0.0}])
def test_impossible_budgets_are_refused(budget: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"budget\."):
        BudgetConfig(**budget)


def test_the_dry_run_tells_the_cost_of_the_whole_input() -> None:
    from skipvar.distributed.dry_run import cost_lines

    [line] = cost_lines(BudgetConfig(usd_per_replica_hour=1.8), 1_000_000, 0.5)
    assert line == "cost of the whole input: 250.00 USD, 0.00025 an image, at 1.8 USD a replica hour"
    [line] = cost_lines(BudgetConfig(usd_per_replica_hour=1.8, max_usd=100), 1_000_000, 0.5)
    assert line.endswith("more than budget.max_usd (100), where it will stop")
    assert "unknown" in cost_lines(BudgetConfig(), 5, 1.0)[0]
