"""A configuration is read, overridden, frozen and printed; reading it needs neither torch nor Ray."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from skipvar.config import RunConfig, load_config, to_yaml

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("name", ["emoji", "infinity_2b", "infinity_8b", "nightly"])
def test_shipped_files_hold_every_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONF.parent)
    config = load_config(CONF / f"{name}.yaml")
    for line in to_yaml(config).splitlines():
        key = line.strip().split(":")[0]
        if not key.startswith("-"):
            assert f"{key}:" in (CONF / f"{name}.yaml").read_text(), f"{name}.yaml lacks {key}"


def test_overrides_win_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sampling: {cfg: 1.5, seed: 3}\n")
    config = load_config(tmp_path / "a.yaml", ["sampling.cfg=[1,2.5]", "input.limit=7", "input.limit=8", "policy=null"])
    assert config.sampling.cfg == [1, 2.5]
    assert (config.sampling.seed, config.input.limit, config.policy) == (3, 8, None)


def test_values_that_are_no_yaml_are_taken_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    assert load_config(tmp_path / "a.yaml", ["output.path={date}/x"]).output.path == "{date}/x"


def test_a_configuration_is_frozen(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    config = load_config(tmp_path / "a.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sampling.cfg = 3.0  # type: ignore[misc]


def test_what_is_printed_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {path: 'random:1'}\nsampling: {tau: [0.5, 0.1]}\n")
    config = load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "b.yaml") == config != RunConfig()


def test_reading_a_configuration_imports_neither_torch_nor_ray() -> None:
    code = "import sys, skipvar, skipvar.types, skipvar.config; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
