"""Reads weights of every published layout into our networks: the one place that knows foreign names.

Nothing is unpickled: `.pth` files are opened with `weights_only=True`. A left-over or missing key, or a wrong shape, is
a `ModelError` that names it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from skipvar.errors import ModelError, first_line
from skipvar.model.look import read_index

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


_BLOCK_NAMES = {
    "ada_gss": "modulation",
    "sa.mat_qkv.weight": "self_attention.qkv.weight",
    "sa.q_bias": "self_attention.q_bias",
    "sa.v_bias": "self_attention.v_bias",
    "sa.scale_mul_1H11": "self_attention.log_scale",
    "sa.proj.weight": "self_attention.projection.weight",
    "sa.proj.bias": "self_attention.projection.bias",
    "ca_norm.weight": "cross_norm.weight",
    "ca_norm.bias": "cross_norm.bias",
    "ca.mat_q.weight": "cross_attention.query.weight",
    "ca.mat_q.bias": "cross_attention.query.bias",
    "ca.mat_kv.weight": "cross_attention.key_value.weight",
    "ca.v_bias": "cross_attention.v_bias",
    "ca.proj.weight": "cross_attention.projection.weight",
    "ca.proj.bias": "cross_attention.projection.bias",
    "ffn.fc1.weight": "mlp.up.weight",
    "ffn.fc1.bias": "mlp.up.bias",
    "ffn.fc2.weight": "mlp.down.weight",
    "ffn.fc2.bias": "mlp.down.bias",
}

_TRANSFORMER_NAMES = {
    "text_norm.weight": "text_norm",
    "cfg_uncond": "unconditional_text",
    "text_proj_for_sos.ca.mat_q": "text_pooling.query",
    "text_proj_for_sos.ca.mat_kv.weight": "text_pooling.key_value.weight",
    "text_proj_for_sos.ca.v_bias": "text_pooling.v_bias",
    "text_proj_for_sos.ca.proj.weight": "text_pooling.projection.weight",
    "text_proj_for_sos.ca.proj.bias": "text_pooling.projection.bias",
    "text_proj_for_ca.0.weight": "text_up.weight",
    "text_proj_for_ca.0.bias": "text_up.bias",
    "text_proj_for_ca.2.weight": "text_down.weight",
    "text_proj_for_ca.2.bias": "text_down.bias",
    "shared_ada_lin.1.weight": "shared_modulation.weight",
    "shared_ada_lin.1.bias": "shared_modulation.bias",
    "pos_start": "start_position",
    "word_embed.weight": "token_embedding.weight",
    "word_embed.bias": "token_embedding.bias",
    "lvl_embed.weight": "level_embedding",
    "head_nm.ada_lin.1.weight": "head_modulation.weight",
    "head_nm.ada_lin.1.bias": "head_modulation.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}

_IGNORED = re.compile(
    r"(^|\.)(zero_k_bias|lvl_1L|attn_bias_for_masking|Infinity_visible_kvlen|Infinity_invisible_qlen)$"
)
"""Buffers of upstream that hold no weights: zeros, and masks of training."""

_BLOCK = re.compile(r"^block_chunks\.(\d+)\.module\.(\d+)\.(.+)$")
_CHUNKLESS_BLOCK = re.compile(r"^(?:unregistered_blocks|blocks)\.(\d+)\.(.+)$")


class RenamedState(State):
    """Tensors under our names that remembers the file's own: those are what its user knows."""

    def __init__(self, official: Callable[[str], str]) -> None:
        super().__init__()
        self._official = official
        self._originals: dict[str, str] = {}

    def add(self, name: str, original: str, tensor: Tensor) -> None:
        """Takes a tensor under our `name` and the file's `original`; a second one of our name is a `ModelError`."""
        if name in self:
            raise ModelError(f"{self._originals[name]} and {original} are two tensors for one parameter")
        self[name], self._originals[name] = tensor, original

    def source_name(self, name: str) -> str:
        """What the file calls one of our names, or would call it."""
        return self._originals.get(name) or self._official(name)


def without_wrapper(state: State, known: Iterable[str], source: str) -> State:
    """Takes off the one prefix (`vae.`, `trainer.gpt.`) under which a network's `known` names stand.

    Names outside it stay, so that loading refuses them by name; two networks in one file are a `ModelError`.
    """
    found = {name.removesuffix(end) for name in state for end in known if name == end or name.endswith(f".{end}")}
    if "" in found or not found:
        return state
    if len(found) > 1:
        raise ModelError(f"{source}: holds more than one such network, under {_some(sorted(found))}: keep one of them")
    prefix = found.pop()
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def transformer_state_from_official(state: State, source: str = "transformer") -> RenamedState:
    """Infinity's names to ours. Names that nobody knows pass through, so that loading refuses them by name."""
    state = without_wrapper(state, _TRANSFORMER_NAMES, source)
    matches = [match for name in state if (match := _BLOCK.match(name))]
    blocks_per_chunk = 1 + max((int(match[2]) for match in matches), default=0)
    own = RenamedState(lambda name: _official_transformer_name(name, blocks_per_chunk if matches else None))
    for name, tensor in state.items():
        if _IGNORED.search(name):
            continue
        if match := _BLOCK.match(name):
            index, part = int(match[1]) * blocks_per_chunk + int(match[2]), match[3]
        elif match := _CHUNKLESS_BLOCK.match(name):
            index, part = int(match[1]), match[2]
        else:
            own.add(_TRANSFORMER_NAMES.get(name, name), name, tensor)
            continue
        own.add(f"blocks.{index}.{_BLOCK_NAMES[part]}" if part in _BLOCK_NAMES else name, name, tensor)
    return own


def _official_transformer_name(name: str, blocks_per_chunk: int | None) -> str:
    """Infinity's name of one of ours."""
    if match := re.match(r"^blocks\.(\d+)\.(.+)$", name):
        index, part = (
            int(match[1]),
            next((theirs for theirs, ours in _BLOCK_NAMES.items() if ours == match[2]), match[2]),
        )
        if blocks_per_chunk is None:
            return f"blocks.{index}.{part}"
        return f"block_chunks.{index // blocks_per_chunk}.module.{index % blocks_per_chunk}.{part}"
    return next((theirs for theirs, ours in _TRANSFORMER_NAMES.items() if ours == name), name)


_VAE_RULES = (
    (re.compile(r"\bmid\.block_([12])\."), lambda match: f"mid.{int(match[1]) - 1}."),
    (re.compile(r"\b(?:up|down)\.(\d+)\.block\.(\d+)\."), lambda match: f"levels.{match[1]}.blocks.{match[2]}."),
    (
        re.compile(r"\b(?:up|down)\.(\d+)\.(upsample|downsample)\.conv\."),
        lambda match: f"levels.{match[1]}.{match[2]}.",
    ),
    (re.compile(r"\bnin_shortcut\."), lambda _: "shortcut."),
    (re.compile(r"\.(?:conv|norm)\.(weight|bias)$"), lambda match: f".{match[1]}"),
)

_VAE_RULES_BACK = (
    (re.compile(r"^mid\.(\d)\."), lambda match: f"mid.block_{int(match[1]) + 1}."),
    (re.compile(r"^levels\.(\d+)\.blocks\.(\d+)\."), lambda match: f"up.{match[1]}.block.{match[2]}."),
    (re.compile(r"^levels\.(\d+)\.upsample\."), lambda match: f"up.{match[1]}.upsample.conv."),
    (re.compile(r"\bshortcut\."), lambda _: "nin_shortcut."),
    (re.compile(r"(norm\w*)\.(\w+)$"), lambda match: f"{match[1]}.norm.{match[2]}"),
    (re.compile(r"(conv\w*|nin_shortcut)\.(\w+)$"), lambda match: f"{match[1]}.conv.{match[2]}"),
)

_VAE_LANDMARKS = [f"decoder.{name}.weight" for name in ("conv_in", "conv_in.conv", "conv_out", "conv_out.conv")]


def decoder_state_from_official(state: State, source: str = "VAE") -> RenamedState:
    """The decoder's part of an official VAE file (`{"vae": {...}}`), under our names.

    Accepts upstream's alias `X.weight` for `X.conv.weight` and `X.norm.weight`. The encoder and the quantizer's mask
    are left out: generation does not use them.
    """
    own = RenamedState(lambda name: f"decoder.{_substitute(name, _VAE_RULES_BACK)}")
    for name, tensor in without_wrapper(state, _VAE_LANDMARKS, source).items():
        if not name.startswith(("encoder.", "quantizer.", "quantize.")):
            own.add(_substitute(name.removeprefix("decoder."), _VAE_RULES), name, tensor)
    return own


def _substitute(name: str, rules: Iterable[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def load_into(module: nn.Module, state: State, source: str) -> None:
    """Copies every tensor of `state` into `module` in float32; shapes may differ by axes of size one.

    Raises `ModelError` naming the keys that are missing, left over, or of another shape.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    source_name = state.source_name if isinstance(state, RenamedState) else str
    missing, left_over = (sorted(map(source_name, names)) for names in (set(own) - set(state), set(state) - set(own)))
    if missing or left_over:
        found = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(left_over)}"] * bool(left_over)
        raise ModelError(f"{source}: does not fit the model's configuration: it {' and '.join(found)}")
    with torch.no_grad():
        for name, parameter in own.items():
            tensor = state[name]
            if tuple(size for size in tensor.shape if size != 1) != tuple(
                size for size in parameter.shape if size != 1
            ):
                shapes = f"has shape {tuple(tensor.shape)}, the configuration wants {tuple(parameter.shape)}"
                raise ModelError(f"{source}: {source_name(name)} {shapes}")
            parameter.copy_(tensor.reshape(parameter.shape))


def fit_unconditional_text(state: State, num_rows: int, source: str = "transformer") -> None:
    """Cuts the learned unconditional text to the configured length, as upstream does; a shorter one is refused."""
    table = state.get("unconditional_text")
    if table is None or table.ndim != 2:
        return  # loading says what is wrong
    if len(table) < num_rows:
        wanted = f"the configuration's text_max_tokens is {num_rows}"
        raise ModelError(f"{source}: cfg_uncond has {len(table)} rows, {wanted} (at most {len(table)} will do)")
    state["unconditional_text"] = table[:num_rows]


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
