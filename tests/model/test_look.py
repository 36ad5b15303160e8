"""A model's files as the driver sees them: what is cut off, missing or of another size is told before any replica."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from skipvar.config import ModelSection
from skipvar.errors import ModelError
from skipvar.model.identity import EMBEDDED_FOLDER, identify
from skipvar.model.look import look_at_weights, read_object

Damage = Callable[[Path], object]


def cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def change(name: str, **values: object) -> Damage:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for path, value in values.items():
            *sections, key = path.split("__")
            inner = content
            for section in sections:
                inner = inner[section]
            inner[key] = value
        (folder / name).write_text(json.dumps(content))

    return apply


def swap(folder: Path) -> None:
    shutil.copy(folder / "vae.safetensors", folder / "transformer.safetensors")


T5 = "text_encoder"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "transformer cut": (cut("transformer.safetensors"), "transformer.safetensors: the file is cut off or damaged"),
    "vae cut": (cut("vae.safetensors"), "vae.safetensors: the file is cut off or damaged"),
    "empty": (lambda folder: (folder / "vae.safetensors").write_bytes(b""), "vae.safetensors: the file is empty"),
    "no header": (lambda folder: (folder / "vae.safetensors").write_bytes(b"\xff" * 999), "cut off or damaged"),
    "swapped": (swap, "transformer.safetensors: lacks unconditional_text"),
    "deeper": (change("config.json", transformer__depth=9), r"lacks blocks\.8"),
    "shallower": (change("config.json", transformer__depth=7), r"has blocks\.7"),
    "longer text": (change("config.json", transformer__text_max_tokens=65), "unconditional_text has shape"),
    "another vae": (change("config.json", vae__base_width=16), "conv_in.weight has shape"),
    "hashes": (change("config.json", weights_sha256=[1]), "weights_sha256 must give a text for each"),
    "t5 is gone": (lambda folder: shutil.rmtree(folder / T5), "text_encoder is missing"),
    "t5 cut": (cut(f"{T5}/model.safetensors"), "text_encoder/model.safetensors: the file is cut off"),
    "t5 of another width": (change(f"{T5}/config.json", d_model=128), "its features have 128 channels"),
    "t5 is no t5": (change(f"{T5}/config.json", model_type="bert"), "not a T5's configuration"),
    "t5 with fewer rows": (change(f"{T5}/config.json", vocab_size=900), "its largest token is"),
    "t5 with more layers": (change(f"{T5}/config.json", num_layers=4), r"lacks encoder\.block\.3"),
    "t5 without tokenizer": (
        lambda folder: [(folder / T5 / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "no tokenizer there",
    ),
    "tokenizer is no json": (lambda folder: (folder / T5 / "tokenizer.json").write_text("{"), "not a tokenizer"),
    "t5 without weights": (lambda folder: (folder / T5 / "model.safetensors").unlink(), "no weights there"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_in_a_sentence_that_names_the_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    identify(ModelSection(path=str(folder)))  # it is good before
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ModelError, match=message) as found:
        identify(ModelSection(path=str(folder)))
    assert str(folder) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index of shards"),
        ("[]", "not an index of shards"),
        ('{"weight_map": {}}', "must name for each tensor"),
        ('{"weight_map": {"a": 3}}', "must name for each tensor"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "must name for each tensor"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
    ],
)
def test_a_broken_index_of_shards(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        look_at_weights(tmp_path)


def test_official_files_are_looked_at(tmp_path: Path) -> None:
    weights, vae = tmp_path / "w.safetensors", tmp_path / "vae.pth"
    weights.write_bytes((EMBEDDED_FOLDER / "transformer.safetensors").read_bytes()[:5000])
    section = ModelSection(path=str(weights), vae_path=str(vae), text_encoder_path=str(EMBEDDED_FOLDER / T5))
    with pytest.raises(ModelError, match="cut off"):
        identify(section)
    shutil.copy(EMBEDDED_FOLDER / "transformer.safetensors", weights)
    with pytest.raises(ModelError, match=r"vae\.pth: no such weights"):
        identify(section)
    vae.write_bytes(b"")
    with pytest.raises(ModelError, match=r"vae\.pth: the file is empty"):
        identify(section)


def test_a_device_is_not_read() -> None:
    with pytest.raises(ModelError, match="no regular file"):
        read_object(Path("/dev/zero"), "a model configuration")
