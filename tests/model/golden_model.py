"""The golden weights as official files: what the tests of this folder start from."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from skipvar.model.config import ModelConfig
from skipvar.model.transformer import Transformer
from skipvar.parity.golden import GoldenPart

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_config(part: str = "patchify") -> ModelConfig:
    return GoldenPart(GOLDEN / part).config


def official_transformer(part: str = "patchify") -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / part / "transformer.safetensors").items()}


def official_vae(part: str = "patchify") -> dict[str, Tensor]:
    """As in the file's `vae` entry."""
    state = load_file(GOLDEN / part / "vae.safetensors")
    return {n.removeprefix("vae."): t.float() if t.is_floating_point() else t for n, t in state.items()}


def golden_transformer(part: str = "patchify") -> Transformer:
    return GoldenPart(GOLDEN / part).load_pipeline().transformer


def save_text_encoder(folder: Path, width: int) -> Path:
    """A tiny T5 over bytes, with its tokenizer, in Hugging Face layout."""
    config = T5Config(vocab_size=384, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder
