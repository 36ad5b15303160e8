"""Policies decide as the published ones do; fixed ones and `spread` need no probe."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from skipvar.errors import ConfigError
from skipvar.skip.features import DecodedProbe
from skipvar.skip.policy_file import ModelFacts, load_policy
from skipvar.skip.strategy import PAPER_STRATEGIES, STRATEGY_NAMES
from skipvar.types import Request

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "decision_models.json").read_text())
TWO_B = ModelFacts("infinity_2b", 13, {"transformer": "aa", "vae": "bb"})
SHIPPED = {f"ssim_{percent}": REPOSITORY / f"conf/policies/infinity_2b_0.{percent}.json" for percent in (84, 86, 88)}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policies_decide_as_the_golden_table(name: str, make_request: Callable[..., Request]) -> None:
    policy, table = load_policy(str(SHIPPED[name]), TWO_B), GOLDEN["golden_table"]
    expected = table["predictions"][name]["strategy"]
    assert len(expected) == 200 and len(set(expected)) >= 4
    for (change, ratio), strategy in zip(table["features"], expected, strict=True):
        decision = policy.decide(make_request(0), (change, ratio))
        assert decision.strategy.replace("_", "") == strategy
        assert decision.scores is not None and set(decision.scores) <= set(PAPER_STRATEGIES)
        assert sum(decision.scores.values()) == pytest.approx(1)
    assert (policy.decision_scale, policy.probe, policy.known_strategy) == (9, DecodedProbe(4), None)
    assert policy.known_strategy is None


def test_fixed_policies_need_no_probe(make_request: Callable[..., Request]) -> None:
    for name in STRATEGY_NAMES:
        policy = load_policy(f"fixed:{name}", TWO_B)
        assert policy.decide(make_request(1), ()).strategy == policy.known_strategy == name
        assert policy.strategies == (name,) and policy.name == policy.content_hash == f"fixed:{name}"
    assert load_policy(None, TWO_B).name == "fixed:base"
    with pytest.raises(ConfigError, match="needs more than 3 scales"):
        load_policy("fixed:skip_3", ModelFacts("tiny", 3, {}))


def test_spread_goes_by_the_id_alone(make_request: Callable[..., Request]) -> None:
    policy = load_policy("spread", TWO_B)
    requests = [make_request(position) for position in range(700)]
    counts = Counter(policy.decide(request, ()).strategy for request in requests)
    assert set(counts) == set(STRATEGY_NAMES) and min(counts.values()) > 40
    first = policy.decide(requests[0], ()).strategy
    assert policy.decide(make_request(5, id=requests[0].id, seed=99), ()).strategy == first
    with pytest.raises(ConfigError, match="at least 5 scales"):
        load_policy("spread", ModelFacts("tiny", 4, {}))
