"""jobs.convert_checkpoint: official files in, a folder out that the pipeline opens and that computes the same."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipvar.config import ModelSection
from skipvar.errors import ModelError
from skipvar.model.convert import convert_checkpoint
from skipvar.model.identity import sha256_of, write_config
from skipvar.model.pipeline import load_pipeline
from tests.model.golden_model import golden_config, official_transformer, official_vae, save_text_encoder

CONFIG = golden_config()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    torch.save(official_transformer(), folder / "infinity.pth")
    torch.save({"vae": official_vae()}, folder / "vae.pth")
    save_text_encoder(folder / "t5", CONFIG.transformer.text_width)
    write_config(CONFIG, folder)
    return folder


def command(official: Path, out: Path, *extra: str) -> "subprocess.CompletedProcess[str]":
    arguments = ["--config", "config.json", "--transformer", "infinity.pth", "--vae", "vae.pth", "--text-encoder", "t5"]
    return subprocess.run(
        [sys.executable, "-m", "jobs.convert_checkpoint", *arguments, "--out", str(out), *extra],
        cwd=official,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_command_writes_a_folder_that_opens(official: Path, tmp_path: Path) -> None:
    done = command(official, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    printed = dict(reversed(line.split("  ")) for line in done.stdout.splitlines())
    assert {"config.json", "transformer.safetensors", "vae.safetensors"} <= printed.keys()
    assert all(sha256_of(tmp_path / "model" / name) == sha256 for name, sha256 in printed.items())
    assert all(name.startswith("decoder.") for name in load_file(tmp_path / "model" / "vae.safetensors"))
    pipeline = load_pipeline(ModelSection(name="infinity_8b", path=str(tmp_path / "model"), dtype="float32"))
    assert pipeline.config == CONFIG
    assert pipeline.weights_sha256["transformer"] == printed["transformer.safetensors"]
    assert torch.equal(pipeline.transformer.head.weight, official_transformer()["head.weight"])
    assert pipeline.text_encoder.encode("ab").shape == (3, CONFIG.transformer.text_width)


def test_bfloat16_keeps_the_exact_parts(official: Path, tmp_path: Path) -> None:
    paths = (official / "infinity.pth", official / "vae.pth", official / "t5")
    convert_checkpoint(CONFIG, *paths, tmp_path / "model", torch.bfloat16)
    stored = load_file(tmp_path / "model" / "transformer.safetensors")
    is_exact = {name: tensor.dtype == torch.float32 for name, tensor in stored.items()}
    assert is_exact["head.weight"] and is_exact["text_norm"] and not is_exact["blocks.0.mlp.up.weight"]
    pipeline = load_pipeline(ModelSection(path=str(tmp_path / "model"), dtype="bfloat16"))
    assert pipeline.transformer.blocks[0].mlp.up.weight.dtype == torch.bfloat16


def test_mistakes_are_one_sentence_and_exit_2(official: Path, tmp_path: Path) -> None:
    config = json.loads((official / "config.json").read_text())
    config["transformer"]["text_max_tokens"] = 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = command(official, tmp_path / "model", "--config", str(tmp_path / "config.json"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cfg_uncond has 64 rows" in done.stderr
    assert not (tmp_path / "model").exists()


def convert(official: Path, out: Path, **changes: object) -> None:
    paths = {"transformer": official / "infinity.pth", "vae": official / "vae.pth", "text_encoder": official / "t5"}
    convert_checkpoint(**{"config": CONFIG, **paths, "out": out, "dtype": torch.float32, **changes})  # type: ignore[arg-type]


def test_longer_unconditional_text_is_cut(official: Path, tmp_path: Path) -> None:
    shorter = dataclasses.replace(CONFIG, transformer=dataclasses.replace(CONFIG.transformer, text_max_tokens=40))
    convert(official, tmp_path / "model", config=shorter)
    rows = load_file(tmp_path / "model" / "transformer.safetensors")["unconditional_text"]
    assert torch.equal(rows, official_transformer()["cfg_uncond"][:40])


def test_what_does_not_fit_is_named_and_nothing_is_written(official: Path, tmp_path: Path) -> None:
    state = official_transformer()
    del state["word_embed.bias"]
    save_file(state, tmp_path / "short.safetensors")
    out = tmp_path / "model"
    with pytest.raises(ModelError, match=r"short\.safetensors.*lacks word_embed\.bias"):
        convert(official, out, transformer=tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"vae\.pth"):
        convert(official, out, vae=official / "infinity.pth", transformer=official / "vae.pth")
    with pytest.raises(ModelError, match="no text encoder"):
        convert(official, out, text_encoder=tmp_path / "absent")
    save_text_encoder(tmp_path / "narrow", 32)
    with pytest.raises(ModelError, match=r"32 channels.*128"):
        convert(official, out, text_encoder=tmp_path / "narrow")
    assert not out.exists()
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(ModelError, match="not empty"):
        convert(official, out)
