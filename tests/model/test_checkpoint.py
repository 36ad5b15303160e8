"""Weights of every published layout come in whole; what does not fit is named; nothing is unpickled."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from skipvar.errors import ModelError
from skipvar.model.checkpoint import decoder_weights, read_state, transformer_weights
from skipvar.model.identity import sha256_of
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder
from tests.model.golden_model import golden_config, golden_transformer, official_transformer, official_vae

QKV = "block_chunks.0.module.0.sa.mat_qkv.weight"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return golden_transformer().state_dict()


def loaded(path: Path) -> dict[str, Tensor]:
    transformer = Transformer(golden_config().transformer)
    transformer.load_state_dict(transformer_weights(transformer, path))
    return transformer.state_dict()


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.parametrize("prefix", [(), ("model",), ("trainer", "gpt_fsdp")])
def test_a_pth_file_flat_or_nested(prefix: tuple[str, ...], tmp_path: Path, reference: dict[str, Tensor]) -> None:
    content: dict = official_transformer()
    for name in reversed(prefix):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "infinity.pth")
    assert_same(loaded(tmp_path / "infinity.pth"), reference)


def test_a_file_of_two_networks_is_refused_with_both_named(tmp_path: Path) -> None:
    state = official_transformer()
    torch.save({"gpt": state, "gpt_ema": state}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"gpt\., gpt_ema\."):
        loaded(tmp_path / "x.pth")


def test_safetensors_and_old_buffers(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    save_file(official_transformer() | {"lvl_1L": torch.zeros(1, 5)}, tmp_path / "x.safetensors")
    assert_same(loaded(tmp_path / "x.safetensors"), reference)


def write_shards(folder: Path, suffix: str) -> dict[str, str]:
    state = sorted(official_transformer().items())
    weight_map = {}
    for index, part in enumerate((state[::2], state[1::2])):
        name = f"model-{index + 1:05}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(dict(part), folder / name)
        weight_map |= {key: name for key, _ in part}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_folder(suffix: str, tmp_path: Path, reference: dict[str, Tensor]) -> None:
    write_shards(tmp_path, suffix)
    assert_same(loaded(tmp_path), reference)


def test_an_index_that_lists_absent_tensors(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, "safetensors")
    weight_map["absent.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"absent\.weight"):
        loaded(tmp_path)


def test_a_folder_of_two_files_without_an_index(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="found 2 files"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", [QKV, "cfg_uncond", "head.weight"])
def test_a_missing_key_is_named_as_the_file_would(name: str, tmp_path: Path) -> None:
    state = official_transformer()
    del state[name]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"x\.safetensors.*lacks {name}"):
        loaded(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["surprise.weight", "block_chunks.0.module.0.sa.surprise"])
def test_a_left_over_key_is_named(name: str, tmp_path: Path) -> None:
    save_file(official_transformer() | {name: torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"unknown {name}"):
        loaded(tmp_path / "x.safetensors")


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    save_file(official_transformer() | {QKV: torch.zeros(3, 128)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"{QKV} has shape \(3, 128\)"):
        loaded(tmp_path / "x.safetensors")


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/skipvar_was_here"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"x": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"x": Payload()}))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ModelError, match=name):
            read_state(tmp_path / name)
    assert not Path("/tmp/skipvar_was_here").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_broken_files_give_one_sentence(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="x\\.") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


def test_absent_files_and_files_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such"):
        read_state(tmp_path / "x.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(ModelError, match="no tensors"):
        read_state(tmp_path / "empty.pth")


def test_unconditional_text_is_cut_but_not_made_up(tmp_path: Path) -> None:
    rows, sizes = official_transformer()["cfg_uncond"], golden_config().transformer
    save_file(official_transformer(), tmp_path / "x.safetensors")
    shorter, longer = (Transformer(replace(sizes, text_max_tokens=count)) for count in (10, 512))
    state = transformer_weights(shorter, tmp_path / "x.safetensors")
    assert torch.equal(state["unconditional_text"], rows[:10])
    with pytest.raises(ModelError, match=rf"cfg_uncond has {len(rows)} rows.*512"):
        transformer_weights(longer, tmp_path / "x.safetensors")


def decoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    decoder = Decoder(golden_config().vae)
    with TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "vae.pth"))
        decoder.load_state_dict(decoder_weights(decoder, Path(folder, "vae.pth")))
    return decoder.state_dict()


def test_a_decoder_by_itself_and_one_under_our_names() -> None:
    state = official_vae()
    plain = decoder_of(state)
    assert_same(decoder_of({name.removeprefix("decoder."): tensor for name, tensor in state.items()}), plain)
    assert_same(decoder_of({f"decoder.{name}": tensor for name, tensor in plain.items()}), plain)


def test_a_transformer_under_our_names(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    save_file(reference, tmp_path / "x.safetensors")
    assert_same(loaded(tmp_path / "x.safetensors"), reference)


def test_vae_aliases_encoder_and_masks(tmp_path: Path) -> None:
    state = official_vae()
    plain = decoder_of(state)
    aliased = {n.replace(".conv.weight", ".weight").replace(".norm.", "."): t for n, t in state.items()}
    extra = {"encoder.conv_in.conv.weight": torch.zeros(1), "quantize.lfq.mask": torch.zeros(14, dtype=torch.int64)}
    torch.save({"vae": state | extra}, tmp_path / "vae.pth")
    assert_same(decoder_of(read_state(tmp_path / "vae.pth")), plain)
    assert_same(decoder_of(aliased), plain)


def test_an_alias_beside_its_name_is_refused() -> None:
    name = "decoder.mid.block_1.conv1.conv.weight"
    state = official_vae()
    with pytest.raises(ModelError, match="two tensors for one parameter"):
        decoder_of(state | {name.replace(".conv.weight", ".weight"): state[name]})


@pytest.mark.parametrize(
    "name",
    [
        "decoder.mid.block_2.norm1.norm.bias",
        "decoder.up.1.block.0.nin_shortcut.conv.weight",
        "decoder.up.2.upsample.conv.conv.weight",
        "decoder.conv_out.conv.bias",
    ],
)
def test_vae_keys_are_named_as_the_file_does(name: str) -> None:
    state = official_vae()
    if name not in state:
        name = next(key for key in state if name.split(".")[-3] in key and key.endswith("weight"))
    tensor = state.pop(name)
    with pytest.raises(ModelError, match=f"lacks {name}"):
        decoder_of(state)
    with pytest.raises(ModelError, match=r"decoder\.attention\.weight"):
        decoder_of(state | {name: tensor, "decoder.attention.weight": tensor})
    with pytest.raises(ModelError, match=f"{name} has shape"):
        decoder_of(state | {name: torch.zeros(7, 7)})


def test_hashes_follow_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = sha256_of(tmp_path)
    assert sha256_of(tmp_path / "a") != first
    (tmp_path / "a").write_bytes(b"2")
    assert sha256_of(tmp_path) != first
