"""What a run is opened with, before any replica starts."""

import json
import shutil
from pathlib import Path

import pytest

from skipvar.cli.running import read_config
from skipvar.distributed.opening import open_run, settle
from skipvar.errors import ConfigError
from skipvar.model.identity import EMBEDDED_FOLDER


@pytest.mark.parametrize("name", ["emoji", "mine"])
def test_a_converted_folder_tells_the_model_s_name_whatever_the_configuration_calls_it(
    tmp_path: Path, name: str
) -> None:
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**content, "name": "mine"}))
    overrides = [f"model.name={name}", f"model.path={tmp_path}/model", "policy=null", f"output.path={tmp_path}/out"]
    run = open_run(settle(read_config("conf/emoji.yaml", [*overrides, "sampling.size=128"])), "cpu")
    run.lease.release()
    assert run.order.dataset.model == run.record.parts["model"]["name"] == "mine"


def test_official_files_need_a_preset_s_name(tmp_path: Path) -> None:
    for file in ("w.pth", "v.pth"):
        (tmp_path / file).write_bytes(b"")
    overrides = [f"model.path={tmp_path}/w.pth", f"model.vae_path={tmp_path}/v.pth", "model.name=mine", "policy=null"]
    config = read_config("conf/emoji.yaml", [*overrides, f"model.text_encoder_path={tmp_path}/t5"])
    with pytest.raises(ConfigError, match=r"model\.name: mine is not usable; accepted: one of emoji, infinity_125m"):
        open_run(settle(config), "cpu")
