"""Text features: one prompt at a time, no padding, cut where upstream cuts."""

import shutil
from pathlib import Path

import pytest
import torch

from skipvar.errors import ModelError
from skipvar.model.text_encoder import RandomTextEncoder, T5TextEncoder
from tests.model.golden_model import save_text_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("t5"), 16)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5TextEncoder:
    return T5TextEncoder.load(folder, max_tokens=12, dtype=torch.float32, device=CPU)


def test_a_prompt_has_its_tokens_and_the_end_token(encoder: T5TextEncoder) -> None:
    features = encoder.encode("a cat")
    assert features.shape == (6, 16) and features.dtype == torch.float32
    assert encoder.encode("").shape == (1, 16)


def test_it_is_what_padding_with_a_mask_gives(encoder: T5TextEncoder) -> None:
    """Upstream pads to 512 and keeps the real rows."""
    ids = encoder.tokenizer("a cat", padding="max_length", max_length=12, return_tensors="pt")
    with torch.inference_mode():
        padded = encoder.encoder(**ids).last_hidden_state[0, : int(ids.attention_mask.sum())]
    torch.testing.assert_close(encoder.encode("a cat"), padded, atol=1e-5, rtol=1e-5)


def test_long_prompts_are_cut_and_keep_the_end_token(encoder: T5TextEncoder) -> None:
    long = encoder.encode("a very long prompt indeed")
    assert long.shape == (12, 16)
    assert torch.equal(long, encoder.encode("a very long"))


def test_features_depend_on_the_prompt_alone(encoder: T5TextEncoder) -> None:
    first = encoder.encode("a dog")
    encoder.encode("something else")
    assert torch.equal(first, encoder.encode("a dog"))


def test_bfloat16_gives_float32_features_near_the_exact_ones(folder: Path, encoder: T5TextEncoder) -> None:
    rounded = T5TextEncoder.load(folder, max_tokens=12, dtype=torch.bfloat16, device=CPU).encode("a cat")
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, encoder.encode("a cat"), atol=0.1, rtol=0.1)


def test_folders_that_hold_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="no text encoder there"):
        T5TextEncoder.load(tmp_path, max_tokens=12, dtype=torch.float32, device=CPU)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="not a loadable T5 encoder") as caught:
        T5TextEncoder.load(tmp_path, max_tokens=12, dtype=torch.float32, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "null", "[" * 5000, '{"model_type": "t5", "d_ff": "x"}', '{"d_model": -1}'])
def test_whatever_the_configuration_holds_it_is_one_sentence(tmp_path: Path, folder: Path, content: str) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text(content)
    with pytest.raises(ModelError, match="not a loadable T5 encoder"):
        T5TextEncoder.load(tmp_path / "t5", max_tokens=12, dtype=torch.float32, device=CPU)


def test_random_encoders_are_seeded() -> None:
    first, again, other = (
        RandomTextEncoder(text_width=8, max_tokens=9, seed=seed, device=CPU).encode("hello") for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_random_features_have_a_row_for_each_byte_and_the_end_and_are_cut() -> None:
    encoder = RandomTextEncoder(text_width=8, max_tokens=4, seed=0, device=CPU)
    assert encoder.encode("").shape == (1, 8) and encoder.encode("é").shape == (3, 8)
    assert torch.equal(encoder.encode("abcdef"), encoder.encode("abc")) and encoder.encode("abc").dtype == torch.float32
