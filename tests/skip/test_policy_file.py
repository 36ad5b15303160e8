"""Policy files: the shipped ones hold what was published, and none is used for what it was not fitted for."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipvar.errors import ConfigError
from skipvar.skip.policy_file import ModelFacts, load_policy

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "decision_models.json").read_text())
TWO_B = ModelFacts("infinity_2b", 13, {"transformer": "aa", "vae": "bb"})
SHIPPED = {f"ssim_{percent}": REPOSITORY / f"conf/policies/infinity_2b_0.{percent}.json" for percent in (84, 86, 88)}


@pytest.fixture
def policy_file(tmp_path: Path) -> Callable[..., str]:
    """A shipped policy, changed."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda content: None) -> str:
        content = json.loads(SHIPPED["ssim_86"].read_text())
        change(content)
        (tmp_path / "policy.json").write_text(json.dumps(content))
        return str(tmp_path / "policy.json")

    return write


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policies_have_the_published_coefficients(name: str) -> None:
    content = json.loads(SHIPPED[name].read_text())
    assert "2506.08908" in content["source"] and "607be0e" in content["source"]
    for stage in ("skip", "uncond"):
        ours, published = content["stages"][stage], GOLDEN["models"][name][stage]
        assert [ours[key] for key in ("classes", "coef", "intercept")] == [
            published[key] for key in ("classes", "coef", "intercept")
        ]
        assert (ours["mean"], ours["scale"]) == (published["scaler_mean"], published["scaler_scale"])


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        (ModelFacts("emoji", 13, {}), "another model"),
        (ModelFacts("infinity_2b", 10, {}), "another number of scales"),
    ],
)
def test_a_policy_for_something_else_is_refused_unless_forced(facts: ModelFacts, what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what}.*policy_force"):
        load_policy(str(SHIPPED["ssim_86"]), facts)
    policy = load_policy(str(SHIPPED["ssim_86"]), facts, force=True)
    assert policy.decision_scale == facts.num_scales - 4


def test_a_policy_for_other_weights_is_refused_unless_forced(policy_file: Callable[..., str]) -> None:
    path = policy_file(lambda content: content["fitted_for"].update(weights_sha256={"transformer": "cc"}))
    with pytest.raises(ConfigError, match="another transformer weights"):
        load_policy(path, TWO_B)
    assert load_policy(path, TWO_B, force=True).known_strategy is None
    path = policy_file(lambda content: content["fitted_for"].update(weights_sha256={"transformer": "aa"}))
    assert load_policy(path, TWO_B).known_strategy is None


def test_a_decision_too_late_for_the_schedule_is_refused(policy_file: Callable[..., str]) -> None:
    path = policy_file(lambda content: content["fitted_for"].update(decision_scale=11))
    with pytest.raises(ConfigError, match="another decision scale"):
        load_policy(path, TWO_B)


def test_the_content_hash_follows_the_file(policy_file: Callable[..., str]) -> None:
    first = load_policy(policy_file(), TWO_B).content_hash
    path = policy_file(lambda content: content["stages"]["skip"]["intercept"].__setitem__(0, 9))
    second = load_policy(path, TWO_B).content_hash
    assert first != second == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(kind="tree"),
        lambda content: content.pop("stages"),
        lambda content: content["probe"].update(features=["fft_high_frequency_ratio", "sobel_change"]),
        lambda content: content["stages"]["skip"].update(mean=[0.1]),
        lambda content: content["stages"]["skip"].update(scale=[0.1, 0.0]),
        lambda content: content["stages"]["skip"].update(coef=[[1, 2]]),
        lambda content: content["stages"]["skip"].update(classes=[0, 1, 2, 4]),
        lambda content: content["stages"]["skip"].update(intercept=["a", 1, 2, 3]),
        lambda content: content["fitted_for"].pop("model"),
        lambda content: content["fitted_for"].pop("num_scales"),
        lambda content: content.update(fitted_for=None),
        lambda content: content["fitted_for"].update(weights_sha256={"transformer": {"a": 1}}),
        lambda content: content["fitted_for"].update(weights_sha256=["aa"]),
        lambda content: content["probe"].update(grid_scale=13),
        lambda content: content["stages"]["uncond"]["coef"][0].__setitem__(0, float("nan")),
    ],
)
def test_broken_policy_files_are_one_sentence(
    change: Callable[[dict[str, Any]], Any], policy_file: Callable[..., str]
) -> None:
    path = policy_file(change)
    with pytest.raises(ConfigError, match=r"policy\.json") as caught:
        load_policy(path, TWO_B)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["fixed:skip_9", "fixed:", "absent.json", "unknown", "conf"])
def test_specs_that_name_nothing(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec):
        load_policy(spec, TWO_B)


def test_text_that_is_no_json(tmp_path: Path) -> None:
    for content in (b"\x80\x04pickle", b"[]", b"{", b"3"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match="not a policy file"):
            load_policy(str(tmp_path / "x.json"), TWO_B)
