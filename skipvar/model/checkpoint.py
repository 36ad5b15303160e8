"""Reads weights of every published layout into our networks: the one place that knows foreign names.

Nothing is unpickled: `.pth` files are opened with `weights_only=True`. A left-over or missing key, or a wrong shape, is
a `ModelError` that names it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from skipvar.errors import ModelError, first_line
from skipvar.model.look import read_index
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder

State = dict[str, Tensor]


def read_state(path: Path) -> State:
    """All tensors of a `.pth`, `.pt`, `.bin` or safetensors file, or a (sharded) folder, by their names there."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
        raise ModelError(f"{path}: not a readable weights file ({first_line(error)})") from error
    except Exception as error:  # the unpickler's own error type is not public
        raise ModelError(f"{path}: holds more than tensors and is not loaded ({first_line(error)})") from error
    return _flatten(content, path)


def _read_folder(folder: Path) -> State:
    """A Hugging Face folder: `*.index.json` lists the shards; without an index its one weights file counts."""
    indices = sorted(folder.glob("*.index.json"))
    if indices:
        names, shards = read_index(indices[0])
        state: State = {}
        for shard in shards:
            state |= read_state(shard)
        absent = sorted(names - set(state))
        if absent:
            raise ModelError(f"{indices[0]}: lists tensors that its shards lack: {_some(absent)}")
        return state
    files = [file for suffix in ("safetensors", "bin", "pth", "pt") for file in sorted(folder.glob(f"*.{suffix}"))]
    if len(files) != 1:
        raise ModelError(f"{folder}: expected one weights file or an index of shards, found {len(files)} files")
    return read_state(files[0])


def _flatten(content: object, path: Path) -> State:
    """The tensors of a loaded `.pth`: a flat dict, or one nested dict a network (`{"vae": {...}}`) joined by dots."""
    if not isinstance(content, Mapping):
        raise ModelError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    state: State = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            state[str(name)] = value
        elif isinstance(value, Mapping):
            state |= {f"{name}.{inner}": tensor for inner, tensor in _flatten(value, path).items()}
    if not state:
        raise ModelError(f"{path}: holds no tensors")
    return state


_TRANSFORMER_NAMES = {
    "text_norm": "text_norm.weight",
    "unconditional_text": "cfg_uncond",
    "text_pooling.query": "text_proj_for_sos.ca.mat_q",
    "text_pooling.key_value.weight": "text_proj_for_sos.ca.mat_kv.weight",
    "text_pooling.v_bias": "text_proj_for_sos.ca.v_bias",
    "text_pooling.projection.weight": "text_proj_for_sos.ca.proj.weight",
    "text_pooling.projection.bias": "text_proj_for_sos.ca.proj.bias",
    "text_up.weight": "text_proj_for_ca.0.weight",
    "text_up.bias": "text_proj_for_ca.0.bias",
    "text_down.weight": "text_proj_for_ca.2.weight",
    "text_down.bias": "text_proj_for_ca.2.bias",
    "shared_modulation.weight": "shared_ada_lin.1.weight",
    "shared_modulation.bias": "shared_ada_lin.1.bias",
    "start_position": "pos_start",
    "token_embedding.weight": "word_embed.weight",
    "token_embedding.bias": "word_embed.bias",
    "level_embedding": "lvl_embed.weight",
    "head_modulation.weight": "head_nm.ada_lin.1.weight",
    "head_modulation.bias": "head_nm.ada_lin.1.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
"""Our parameter's name to Infinity's."""

_BLOCK_NAMES = {
    "modulation": "ada_gss",
    "self_attention.qkv.weight": "sa.mat_qkv.weight",
    "self_attention.q_bias": "sa.q_bias",
    "self_attention.v_bias": "sa.v_bias",
    "self_attention.log_scale": "sa.scale_mul_1H11",
    "self_attention.projection.weight": "sa.proj.weight",
    "self_attention.projection.bias": "sa.proj.bias",
    "cross_norm.weight": "ca_norm.weight",
    "cross_norm.bias": "ca_norm.bias",
    "cross_attention.query.weight": "ca.mat_q.weight",
    "cross_attention.query.bias": "ca.mat_q.bias",
    "cross_attention.key_value.weight": "ca.mat_kv.weight",
    "cross_attention.v_bias": "ca.v_bias",
    "cross_attention.projection.weight": "ca.proj.weight",
    "cross_attention.projection.bias": "ca.proj.bias",
    "mlp.up.weight": "ffn.fc1.weight",
    "mlp.up.bias": "ffn.fc1.bias",
    "mlp.down.weight": "ffn.fc2.weight",
    "mlp.down.bias": "ffn.fc2.bias",
}
"""The same inside a block."""

_IGNORED = re.compile(
    r"(^|\.)(zero_k_bias|lvl_1L|attn_bias_for_masking|Infinity_visible_kvlen|Infinity_invisible_qlen)$"
)
"""Buffers of upstream that hold no weights: zeros, and masks of training."""


def transformer_weights(network: Transformer, path: Path) -> State:
    """The transformer's tensors from Infinity's file or a converted one, as `fitted` gives them.

    Infinity's blocks stand in chunks or in one list. Its learned unconditional text is cut to the configured length, as
    upstream does; a shorter one is a `ModelError`.
    """
    state, source = read_state(path), str(path)
    if any(name.startswith("text_pooling.") for name in state):  # a name of ours alone
        return fitted(network, state, source)
    state = _without_wrapper(state, _TRANSFORMER_NAMES.values(), source)
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.search(name)}
    chunked = [match for name in state if (match := re.match(r"block_chunks\.\d+\.module\.(\d+)\.", name))]
    blocks_per_chunk = 1 + max((int(match[1]) for match in chunked), default=0)

    def names(own: str) -> list[str]:
        match = re.match(r"blocks\.(\d+)\.(.+)$", own)
        if match is None:
            return [_TRANSFORMER_NAMES[own]]
        index, part = int(match[1]), _BLOCK_NAMES[match[2]]
        in_list = [f"blocks.{index}.{part}", f"unregistered_blocks.{index}.{part}"]
        in_chunk = f"block_chunks.{index // blocks_per_chunk}.module.{index % blocks_per_chunk}.{part}"
        return [in_chunk, *in_list] if chunked else in_list

    table, num_rows = state.get("cfg_uncond"), network.config.text_max_tokens
    if table is not None and table.ndim == 2:
        if len(table) < num_rows:
            wanted = f"the configuration's text_max_tokens is {num_rows}"
            raise ModelError(f"{source}: cfg_uncond has {len(table)} rows, {wanted} (at most {len(table)} will do)")
        state["cfg_uncond"] = table[:num_rows]
    return fitted(network, state, source, names)


_DECODER_NAMES = (
    (r"^mid\.0\.", r"mid.block_1."),
    (r"^mid\.1\.", r"mid.block_2."),
    (r"^levels\.(\d+)\.blocks\.(\d+)\.", r"up.\1.block.\2."),
    (r"^levels\.(\d+)\.upsample\.", r"up.\1.upsample.conv."),
    (r"\bshortcut\.", r"nin_shortcut."),
    (r"(norm\w*)\.(\w+)$", r"\1.norm.\2"),
    (r"(conv\w*|nin_shortcut)\.(\w+)$", r"\1.conv.\2"),
)
"""From our parameter's name to upstream's, one substitution after the other."""

_VAE_LANDMARKS = [f"decoder.{name}.weight" for name in ("conv_in", "conv_in.conv", "conv_out", "conv_out.conv")]


def decoder_weights(network: Decoder, path: Path) -> State:
    """The decoder's tensors from an official VAE file (`{"vae": {...}}`) or a converted one, as `fitted` gives them.

    Accepts upstream's alias `X.weight` for `X.conv.weight` and `X.norm.weight`. The encoder and the quantizer's mask
    are left out: generation does not use them.
    """
    state, source = read_state(path), str(path)
    state = _without_wrapper(state, _VAE_LANDMARKS, source)
    unused = ("encoder.", "quantizer.", "quantize.")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    is_converted = any(name.startswith("decoder.levels.") for name in state)

    def names(own: str) -> list[str]:
        if is_converted:
            return [f"decoder.{own}"]
        official = own
        for pattern, replacement in _DECODER_NAMES:
            official = re.sub(pattern, replacement, official)
        alias = re.sub(r"\.(?:conv|norm)\.(weight|bias)$", r".\1", official)
        return [f"{prefix}{name}" for prefix in ("decoder.", "") for name in (official, alias)]

    return fitted(network, state, source, names)


def _without_wrapper(state: State, known: Iterable[str], source: str) -> State:
    """Takes off the one prefix (`vae.`, `trainer.gpt.`) under which a network's `known` names stand.

    Names outside it stay, so that they are refused by name; two networks in one file are a `ModelError`.
    """
    found = {name.removesuffix(end) for name in state for end in known if name == end or name.endswith(f".{end}")}
    if "" in found or not found:
        return state
    if len(found) > 1:
        raise ModelError(f"{source}: holds more than one such network, under {_some(sorted(found))}: keep one of them")
    prefix = found.pop()
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def fitted(
    network: nn.Module, state: State, source: str, names: Callable[[str], Sequence[str]] = lambda own: [own]
) -> State:
    """A file's tensors under the names and in the shapes of a network's parameters; they may differ by axes of size
    one.

    `names`: what a file may call a parameter, the usual name first. Raises `ModelError` naming the file's keys that are
    missing, left over, double or of another shape.
    """
    own, taken = dict(network.named_parameters()), {}
    for name in own:
        accepted = names(name)
        found = [theirs for theirs in accepted if theirs in state]
        if len(found) > 1:
            raise ModelError(f"{source}: {found[0]} and {found[1]} are two tensors for one parameter")
        taken[name] = found[0] if found else accepted[0]
    missing, left_over = sorted(set(taken.values()) - set(state)), sorted(set(state) - set(taken.values()))
    if missing or left_over:
        wrong = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(left_over)}"] * bool(left_over)
        raise ModelError(f"{source}: does not fit the model's configuration: it {' and '.join(wrong)}")
    for name, parameter in own.items():
        shape, wanted = (tuple(tensor.shape) for tensor in (state[taken[name]], parameter))
        if [size for size in shape if size != 1] != [size for size in wanted if size != 1]:
            raise ModelError(f"{source}: {taken[name]} has shape {shape}, the configuration wants {wanted}")
    return {name: state[taken[name]].reshape(parameter.shape) for name, parameter in own.items()}


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
