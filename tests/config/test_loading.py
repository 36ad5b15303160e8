"""A configuration is read, overridden, frozen and printed; reading it needs neither torch nor Ray."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import skipvar.config as config_module
from skipvar.config import InputConfig, OutputConfig, RunConfig, StorageConfig
from skipvar.config_file import _leaves, _read_yaml, load_config, to_yaml
from skipvar.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


SHIPPED = sorted(path.stem for path in CONF.glob("*.yaml"))


def keys_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a section with its value, dotted."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        is_section = dataclasses.is_dataclass(value)
        found |= keys_of(value, f"{prefix}{item.name}.") if is_section else {f"{prefix}{item.name}": value}
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_state_differences_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONF.parent)
    values, defaults = keys_of(load_config(CONF / f"{name}.yaml")), keys_of(RunConfig())
    stated = {key for key, _, _ in _leaves(_read_yaml(CONF / f"{name}.yaml"), RunConfig, name)}
    assert stated == {key for key, value in values.items() if value != defaults[key]}


def test_what_is_printed_holds_every_key() -> None:
    printed = OmegaConf.create(to_yaml(RunConfig()))
    for key, value in keys_of(RunConfig()).items():
        assert OmegaConf.select(printed, key, default="absent") == value, key


def test_every_key_is_documented_where_it_is_defined() -> None:
    classes = [node for node in ast.parse(inspect.getsource(config_module)).body if isinstance(node, ast.ClassDef)]
    assert len(classes) >= 10
    for section in classes:
        for node, following in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).endswith("Config"):
                if ast.unparse(node.annotation) == "ModelSection":
                    continue
                is_documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_documented, f"{section.name}.{ast.unparse(node.target)}"


@pytest.mark.parametrize(
    ("section", "value"),
    [(InputConfig, {"limit": 0}), (OutputConfig, {"path": ""}), (StorageConfig, {"endpoint_url": "ftp://x"})],
)
def test_a_section_checks_itself(section: type, value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(value))):
        section(**value)


def test_numbers_keep_the_type_that_was_typed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sampling: {cfg: 4}")
    assert load_config(tmp_path / "a.yaml", ["sampling.tau=[1,0.5]"]).sampling.cfg == 4
    config = load_config(tmp_path / "a.yaml", ["engine.batch_size=3", "cluster.gpus_per_replica=0.5"])
    assert (config.engine.batch_size, config.cluster.gpus_per_replica) == (3, 0.5)


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
    code = "import sys, skipvar.types, skipvar.config_file; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
