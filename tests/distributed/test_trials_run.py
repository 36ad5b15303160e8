"""The run that makes trials is resolved for the cluster's devices, whatever the driver's machine has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipvar.config import ModelSection, OutputConfig, RunConfig
from skipvar.config_file import load_config
from skipvar.distributed import trials
from skipvar.distributed.cluster import Cluster
from skipvar.distributed.opening import fingerprint_parts, settle
from skipvar.distributed.outcome import Outcome
from skipvar.engine.resolved import resolve
from skipvar.errors import EXIT_STOPPED, InputError
from skipvar.shards.prompts import plan_input
from skipvar.shards.record import fingerprint
from skipvar.skip.policy import TRIALS


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Trials on a cluster with GPUs, seen from a machine without."""
    monkeypatch.setattr(Cluster, "_find_device", lambda cluster: "cuda")
    (tmp_path / "prompts.txt").write_text("an apple\n")
    (tmp_path / "run.yaml").write_text(f"input: {{path: {tmp_path}/prompts.txt}}\npolicy: {TRIALS}\n")
    config = load_config(tmp_path / "run.yaml", [])
    return replace(config, model=ModelSection(path="random:0"), output=OutputConfig(path=f"{tmp_path}/{{fingerprint}}"))


def test_trials_are_looked_for_where_the_cluster_made_them(config: RunConfig) -> None:
    there, here = (resolve(config, device=device) for device in ("cuda", "cpu"))  # type: ignore[arg-type]
    plan = plan_input(config, there.num_scales, there.max_image_pixels)
    names = [fingerprint(fingerprint_parts(settle(config), one, plan)) for one in (there, here)]
    assert names[0] != names[1]
    with pytest.raises(InputError, match=f"{names[0]}: no finished trials"):
        trials.find_trials_run(config)


def test_what_trials_were_made_with_is_what_the_run_found(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(config, device="cuda")
    counts: dict[str, Any] = {"session_images": 0, "session_seconds": 0.0, "session_errors": 0, "strategies": {}}
    ended = Outcome(
        state="stopped",
        output=config.output.path,
        counts=counts | {"cost": {"usd": None, "usd_per_image": None}},
        resolved=found,
        reason="it was time",
    )
    monkeypatch.setattr(trials, "generate", lambda config, stop, check: ended)
    made = trials.make_trials_run(config, show=lambda line: None)
    assert made.resolved is found and made.resolved.dtype == "bfloat16" and made.trials is None
    assert made.exit_code == EXIT_STOPPED
