"""Reads a golden folder: what the reference implementation gave, to compare with. Its layout: tests/golden/README.md.

Nothing here is computed but names: the runs' settings become requests, strategies of the reference become modes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from skipvar.errors import InputError
from skipvar.model.bsq import Grid
from skipvar.model.config import ModelConfig, TransformerConfig, VaeConfig
from skipvar.model.linear import set_row_padding
from skipvar.model.pipeline import Pipeline, load_weights
from skipvar.model.schedules import INFINITY_SCHEDULES
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder
from skipvar.skip.features import DecodedProbe
from skipvar.skip.policy import LogisticPolicy, LogisticStage
from skipvar.skip.policy_file import stage_from_json
from skipvar.skip.strategy import Mode, Strategy
from skipvar.types import Request

DECISION_INDEX = 9
"""The reference takes its probe after this scale of whatever schedule, unless it is the last."""
STRATEGY_END = 13
"""`skipN` and `uncondN` of the reference change the scales from index 13 - N on, whatever the schedule."""
PROBE_GRID_INDEX = 4
"""The probe is decoded at the grid of this scale."""

SCHEDULES = replace(INFINITY_SCHEDULES, sizes={str(n): n for n in range(1, STRATEGY_END + 1)}, default_size="13")
"""Infinity's schedules, cut to any number of scales."""


def read_json(path: Path) -> Any:
    """A JSON file's content; raises `InputError`."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error


def read_grids(schedule: Sequence[Sequence[int]]) -> tuple[Grid, ...]:
    """A schedule as the reference writes it, `[[1, h, w], ...]`."""
    return tuple((int(height), int(width)) for _, height, width in schedule)


def ratio_of(grids: Sequence[Grid]) -> float:
    """The aspect ratio whose list of scales starts with these grids."""
    for ratio, full in SCHEDULES.grids.items():
        if full[: len(grids)] == tuple(grids):
            return float(ratio)
    raise InputError(f"no schedule of the model starts with {list(grids)}")


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names, in its order."""
    return {name.removeprefix(prefix): tensors[name] for name in sorted(tensors) if name.startswith(prefix)}


def unpack_bits(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Bits `(L, d)` bool of the scales that a file stores."""
    return {
        int(scale): torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)).bool()
        for scale, packed in below("bits_packed_", tensors).items()
    }


@dataclass(frozen=True)
class GoldenProbe:
    """A probe of the reference."""

    grids: tuple[Grid, ...]
    features: Mapping[str, float]
    decisions: Mapping[str, str]
    """What each published policy makes of the features."""
    tensors: Mapping[str, Tensor]
    """The resized sums that were decoded, and corners of what came out, as far as they are stored."""


@dataclass(frozen=True)
class GoldenRun:
    """One generation of the reference."""

    name: str
    path: Path
    """Its JSON; the tensors lie beside it."""
    content: Mapping[str, Any]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All that lies beside the JSON, by its names there; read when first asked for."""
        return load_file(self.path.with_suffix(".safetensors"))

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Token grid `(h, w)` of each scale of the schedule, those that the run skipped included."""
        return read_grids(self.content["spec"]["schedule"])

    @cached_property
    def bits(self) -> dict[int, Tensor]:
        """`(L, d)` bool of the scales that this run stores."""
        return unpack_bits(self.tensors)

    @property
    def probe(self) -> GoldenProbe | None:
        """The run's own, if it took one."""
        if "probe_features" not in self.content:
            return None
        decisions = self.content.get("natural_decision", {})
        return GoldenProbe(self.grids, self.content["probe_features"], decisions, below("probe_", self.tensors))

    @property
    def min_margin(self) -> float:
        """Smallest change of a logit difference that would flip a bit of any scale."""
        return min(float(scale["min_margin"]) for scale in self.content["scales"])

    @property
    def forced_strategy(self) -> str | None:
        """`skipN`, `uncondN` or `base`; None for a plain run."""
        return self.content["spec"]["strategy"]

    @property
    def guidance_layers(self) -> tuple[int, ...]:
        """Where guidance acts, as in `SamplingRules`: 0 on the logits, -j after block depth-j."""
        return tuple(self.content["spec"]["cfg_insertion_layer"])

    @property
    def same_but_strategy(self) -> str:
        """Equal for runs that differ in nothing but their strategy."""
        spec = {key: value for key, value in self.content["spec"].items() if key != "strategy"}
        prompts = (self.content["prompt_index"], self.content.get("negative_prompt_index"))
        return json.dumps([spec, prompts], sort_keys=True)

    def request(self) -> Request:
        """The run's settings; its prompts are names of stored features (`StoredFeatures`)."""
        spec, num_scales = self.content["spec"], len(self.grids)
        return Request(
            position=0,
            image_index=0,
            id=self.name,
            prompt=str(self.content["prompt_index"]),
            negative_prompt=str(self.content["negative_prompt_index"]) if spec.get("negative") else None,
            seed=int(spec["seed"]),
            cfg=_per_scale(spec["cfg"], num_scales),
            tau=_per_scale(spec["tau"], num_scales),
            top_k=int(spec["top_k"]),
            top_p=float(spec["top_p"]),
            aspect_ratio=ratio_of(self.grids),
        )

    def strategy(self) -> Strategy:
        """The scales that really ran, and how."""
        num_scales, num_run = len(self.grids), int(self.content.get("n_scales_run", len(self.content["scales"])))
        first_conditional = num_scales
        if self.forced_strategy and self.forced_strategy.startswith("uncond"):
            first_conditional = STRATEGY_END - int(self.forced_strategy.removeprefix("uncond"))
        modes = [
            Mode.SKIPPED if scale >= num_run else Mode.CONDITIONAL if scale >= first_conditional else Mode.GUIDED
            for scale in range(num_scales)
        ]
        return Strategy(self.forced_strategy or "plain", tuple(modes))


def _per_scale(value: float | Sequence[float], num_scales: int) -> tuple[float, ...]:
    values = [value] * num_scales if isinstance(value, int | float) else value
    return tuple(float(number) for number in values)


class StoredFeatures:
    """Stands in for the text encoder: a prompt is the index of features that the folder stores."""

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        self.features = features

    def encode(self, prompt: str) -> Tensor:
        return self.features[prompt]


@dataclass(frozen=True)
class GoldenPart:
    """One model of a golden folder, `main` or `patchify`."""

    folder: Path

    @property
    def name(self) -> str:
        """Its folder's, with which the names of its cases begin."""
        return self.folder.name

    @cached_property
    def config(self) -> ModelConfig:
        """Sizes, from the reference's names."""
        content = read_json(self.folder / "config.json")
        transformer, vae = content["transformer"], content["vae"]
        return ModelConfig(
            name=self.name,
            transformer=TransformerConfig(
                depth=transformer["depth"],
                width=transformer["embed_dim"],
                num_heads=transformer["num_heads"],
                mlp_ratio=transformer["mlp_ratio"],
                text_width=transformer["text_channels"],
                text_max_tokens=transformer["text_maxlen"],
                latent_channels=vae["codebook_dim"],
                spatial_patchify=bool(transformer["apply_spatial_patchify"]),
            ),
            vae=VaeConfig(
                latent_channels=vae["codebook_dim"],
                base_width=vae["base_ch"],
                width_multipliers=tuple(vae["ch_mult"]),
                num_res_blocks=vae["num_res_blocks"],
            ),
            schedules=SCHEDULES,
        )

    def load_pipeline(self) -> Pipeline:
        """The part's model in float32 on the CPU, without gradients, rows padded as the engine does there."""
        transformer, decoder = Transformer(self.config.transformer), Decoder(self.config.vae)
        load_weights(transformer, decoder, self.folder / "transformer.safetensors", self.folder / "vae.safetensors")
        set_row_padding(transformer, 16)
        return Pipeline(
            config=self.config,
            transformer=transformer.eval().requires_grad_(False),
            decoder=decoder.eval().requires_grad_(False),
            text_encoder=StoredFeatures(below("kv_compact_", load_file(self.folder / "prompts.safetensors"))),
            dtype=torch.float32,
            device=torch.device("cpu"),
            weights_sha256={},
        )

    def runs(self, folder: str = "runs") -> list[GoldenRun]:
        """The generations of a subfolder, by name; other JSON files there are checks."""
        paths = sorted((self.folder / folder).glob("*.json"))
        contents = [(path, read_json(path)) for path in paths]
        return [GoldenRun(path.stem, path, content) for path, content in contents if "spec" in content]

    def checks(self) -> dict[str, dict[str, Any]]:
        """What the reference noted of its forced strategies, by file: for each strategy what ran and what was equal."""
        contents = {path.stem: read_json(path) for path in sorted((self.folder / "runs").glob("*.json"))}
        return {name: content for name, content in contents.items() if "spec" not in content}


@dataclass(frozen=True)
class GoldenFolder:
    """A whole golden folder; any part of it may be absent."""

    folder: Path

    def __post_init__(self) -> None:
        names = ("decision_models.json", "schedules.json", "rope.json")
        if not self.parts and not any((self.folder / name).is_file() for name in names):
            raise InputError(
                f"{self.folder}: not a golden folder (no part with a config.json, none of {', '.join(names)})"
            )

    @cached_property
    def parts(self) -> list[GoldenPart]:
        """The subfolders with a config.json, by name; raises `InputError` where the folder itself is missing."""
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder")
        return [GoldenPart(path.parent) for path in sorted(self.folder.glob("*/config.json"))]

    def json(self, name: str) -> Any:
        """The content of one of the folder's own files, or an empty one."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def policies(self) -> dict[str, LogisticPolicy]:
        """The published decision models, by their names here (`ssim_84`)."""
        models = self.json("decision_models.json").get("models", {})
        return {name: _policy(name, stages) for name, stages in models.items()}


def _policy(name: str, stages: Mapping[str, Any]) -> LogisticPolicy:
    return LogisticPolicy(
        name=name,
        content_hash="",
        decision_scale=DECISION_INDEX,
        probe=DecodedProbe(PROBE_GRID_INDEX),
        skip=_stage(stages["skip"]),
        uncond=_stage(stages["uncond"]),
    )


def _stage(content: Mapping[str, Any]) -> LogisticStage:
    return stage_from_json({**content, "mean": content["scaler_mean"], "scale": content["scaler_scale"]})
