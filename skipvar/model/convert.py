"""Converts upstream's published files to this package's own: safetensors with a JSON configuration beside them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skipvar.errors import ModelError
from skipvar.model import checkpoint
from skipvar.model.config import ModelConfig
from skipvar.model.identity import sha256_of, write_config
from skipvar.model.look import look_at_text_encoder
from skipvar.model.text_encoder import T5TextEncoder
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder


def convert_checkpoint(
    config: ModelConfig, transformer: Path, vae: Path, text_encoder: Path, out: Path, dtype: torch.dtype
) -> dict[str, str]:
    """Writes a folder that `load_folder` opens, and returns the SHA-256 of each of its files by relative name.

    Raises `ModelError` where a file does not fit the configuration; nothing is written then.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: is not empty; choose a folder that is new")
    states = {"transformer": convert_transformer(config, transformer, dtype), "vae": convert_vae(config, vae, dtype)}
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


def convert_transformer(config: ModelConfig, path: Path, dtype: torch.dtype) -> checkpoint.State:
    """The transformer's tensors under our names; parts that compute in float32 stay in float32."""
    state = checkpoint.transformer_state_from_official(checkpoint.read_state(path), str(path))
    checkpoint.fit_unconditional_text(state, config.transformer.text_max_tokens, str(path))
    with torch.device("meta"):
        network = Transformer(config.transformer)
    fitted = _fitted(network, state, str(path))
    is_exact = {name: name.split(".")[0] in Transformer.FLOAT32_PARTS for name in fitted}
    return {name: _stored(tensor, torch.float32 if is_exact[name] else dtype) for name, tensor in fitted.items()}


def convert_vae(config: ModelConfig, path: Path, dtype: torch.dtype) -> checkpoint.State:
    """The decoder's tensors as `decoder.*`."""
    state = checkpoint.decoder_state_from_official(checkpoint.read_state(path), str(path))
    with torch.device("meta"):
        network = Decoder(config.vae)
    return {f"decoder.{name}": _stored(tensor, dtype) for name, tensor in _fitted(network, state, str(path)).items()}


def _fitted(network: nn.Module, state: checkpoint.State, source: str) -> checkpoint.State:
    """The tensors in a network's own shapes, checked against it. The network has no memory, so any size will do."""
    checkpoint.load_into(network, state, source)
    return {name: state[name].reshape(parameter.shape) for name, parameter in network.named_parameters()}


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own, as safetensors wants it."""
    return tensor.to(dtype).clone().contiguous()
