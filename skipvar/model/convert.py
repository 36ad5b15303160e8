"""Converts upstream's published files to this package's own: safetensors with a JSON configuration beside them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from skipvar.errors import ModelError
from skipvar.model.checkpoint import decoder_weights, transformer_weights
from skipvar.model.config import ModelConfig
from skipvar.model.identity import sha256_of, write_config
from skipvar.model.look import look_at_text_encoder
from skipvar.model.text_encoder import T5TextEncoder
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder


def convert_checkpoint(
    config: ModelConfig, transformer: Path, vae: Path, text_encoder: Path, out: Path, dtype: torch.dtype
) -> dict[str, str]:
    """Writes a folder that `model.path` opens, and returns the SHA-256 of each of its files by relative name.

    Parts that compute in float32 stay in float32, whatever the `dtype`. Raises `ModelError` where a file does not fit
    the configuration; nothing is written then.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: is not empty; choose a folder that is new")
    with torch.device("meta"):  # without memory, so that any size will do
        network, decoder = Transformer(config.transformer), Decoder(config.vae)
    states = {
        "transformer": {
            name: _stored(tensor, torch.float32 if name.split(".")[0] in Transformer.FLOAT32_PARTS else dtype)
            for name, tensor in transformer_weights(network, transformer).items()
        },
        "vae": {f"decoder.{name}": _stored(tensor, dtype) for name, tensor in decoder_weights(decoder, vae).items()},
    }
    device = torch.device("cpu")
    look_at_text_encoder(text_encoder, config)
    max_tokens = config.transformer.text_max_tokens
    encoder = T5TextEncoder.load(text_encoder, max_tokens=max_tokens, dtype=dtype, device=device)
    out.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        save_file(state, out / f"{name}.safetensors")
    encoder.encoder.save_pretrained(out / "text_encoder")
    encoder.tokenizer.save_pretrained(out / "text_encoder")
    write_config(config, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): sha256_of(path) for path in files}


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own, as safetensors wants it."""
    return tensor.to(dtype).clone().contiguous()
