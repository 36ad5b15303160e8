"""The tokenizer and the text encoder, as `transformers` loads them."""

from pathlib import Path

import pytest
import torch

from skipvar.model.text_encoder import T5TextEncoder
from skipvar.training.recipe import MODEL, Recipe
from skipvar.training.text import (
    CaptionTokens,
    build_text_encoder,
    build_tokenizer,
    encode_captions,
    save_text_encoder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    tokenizer = build_tokenizer()
    save_text_encoder(build_text_encoder(Recipe().text, tokenizer, seed=0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> T5TextEncoder:
    return T5TextEncoder.load(folder, max_tokens=64, dtype=torch.float32, device=torch.device("cpu"))


def test_words_of_captions_are_whole_tokens(loaded: T5TextEncoder) -> None:
    ids = loaded.tokenizer("Nine small apples on a blue background").input_ids
    tokens = loaded.tokenizer.convert_ids_to_tokens(ids)
    assert [t.strip("Ġ") for t in tokens] == ["nine", "small", "apples", "on", "a", "blue", "background", "</s>"]


@pytest.mark.parametrize("prompt", ["", "zebras, 漢字 & 🐱!", "x" * 5000, "tab\tnew\nline", "it's", "\x00\ufffd"])
def test_every_prompt_encodes(loaded: T5TextEncoder, prompt: str) -> None:
    ids = loaded.tokenizer(prompt).input_ids
    assert ids[-1] == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.unk_token_id not in ids
    features = loaded.encode(prompt)
    assert 1 <= len(features) <= 64
    assert features.shape[1] == MODEL.transformer.text_width
    assert features.isfinite().all()


def test_training_and_inference_see_the_same_features(folder: Path, loaded: T5TextEncoder) -> None:
    tokens = CaptionTokens(build_tokenizer())
    texts = ["apple on red", "a three by three grid of tropical fish on yellow"]
    ids, lengths = tokens.batch(texts)
    assert tokens.max_length >= max(lengths) == ids.shape[1]
    with torch.no_grad():
        padded = encode_captions(loaded.encoder, ids, lengths)
    for text, row, length in zip(texts, padded, lengths, strict=True):
        torch.testing.assert_close(loaded.encode(text), row[:length], atol=1e-5, rtol=1e-4)


def test_unknown_words_carry_no_embedding(loaded: T5TextEncoder) -> None:
    embeddings = loaded.encoder.get_input_embeddings().weight
    assert embeddings[loaded.tokenizer("apple").input_ids].abs().amin(dim=0).max() > 0
    assert not embeddings[loaded.tokenizer("qwrtz", add_special_tokens=False).input_ids].any()
