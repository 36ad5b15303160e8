"""The front door in Python: a model on this machine, and images of prompts. `skipvar.load` is what users call."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from skipvar.checks import is_whole, require, shown
from skipvar.config import Auto, EngineConfig, ModelSection, NumberOrList, RunConfig, SamplingConfig
from skipvar.engine.resolved import resolve
from skipvar.errors import ConfigError, RowError
from skipvar.local import build_local_engine
from skipvar.model import allocator
from skipvar.model.presets import PRESETS, find_preset
from skipvar.shards.cache import StoredFiles
from skipvar.shards.rows import InputRow, InputSpec, requests_of
from skipvar.skip.policy_file import check_spec
from skipvar.types import Failure, Image, Request, RequestKey

if TYPE_CHECKING:
    from skipvar.engine.engine import Engine

DEFAULTS = SamplingConfig()


def load(
    model: str = "emoji",
    *,
    path: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: int | Auto = "auto",
) -> "Model":
    """A model on this machine.

    `model` is a preset's name (`emoji`'s weights are part of the package), or a folder that `skipvar convert` wrote.
    `path`: a preset's weights, as `model.path` of a configuration. `batch_size`: images at a time, at most.
    On a CPU torch gets one thread in this process, since an image's bits must not depend on its batch.

    Raises `ConfigError` for what is not one of these, `ModelError` for weights that do not fit.
    """
    if model not in PRESETS and path is None:
        path, model = model, _name_of(model)
    section = ModelSection(name=model, path=path, device=device, dtype=dtype)
    find_preset(section)
    return Model(section, EngineConfig(batch_size=batch_size))


class Model:
    """A loaded model; use `load`. One thread at a time."""

    def __init__(self, section: ModelSection, engine: EngineConfig) -> None:
        self._config = RunConfig(model=section, engine=engine)
        self._engine: Engine | None = build_local_engine(self._config)
        self._pipeline = self._engine.pipeline
        self._num_calls = 0

    def generate(
        self,
        prompts: Sequence[str],
        *,
        policy: str | None = None,
        seed: int = 0,
        seeds: Sequence[int | None] | None = None,
        cfg: NumberOrList = DEFAULTS.cfg,
        tau: NumberOrList = DEFAULTS.tau,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        negative_prompt: str | None = None,
        size: str | None = None,
        aspect_ratio: float = 1.0,
    ) -> Iterator[Image]:
        """An image of each prompt, in their order; made in batches of one strategy each, as the job does.

        They have the very pixels that `jobs.generate` makes from a file of these prompts with the same settings and
        `sampling.seed=seed`. `seeds` gives prompts their own, as an input's column does (None: derived from `seed`).
        `policy` is a policy file, `fixed:<strategy>`, `spread`, or None for every image in full. The settings are
        those of a configuration's `sampling` section.

        Raises `ConfigError` at once for a setting that cannot be used, `RowError` in place of an image that cannot
        be made. A later call ends an earlier one that was not read to its end.
        """
        sampling = SamplingConfig(
            seed=seed,
            cfg=cfg,
            tau=tau,
            top_k=top_k,
            top_p=top_p,
            negative_prompt=negative_prompt,
            size=size,
            aspect_ratio=aspect_ratio,
        )
        require(not isinstance(prompts, str), "prompts", prompts, "a list of texts")
        for prompt in prompts:
            require(isinstance(prompt, str) and bool(prompt.strip()), "prompts", prompt, "texts that are not empty")
        own_seeds = [None] * len(prompts) if seeds is None else list(seeds)
        require(len(own_seeds) == len(prompts), "seeds", f"a list of {len(own_seeds)}", f"{len(prompts)}, one a prompt")
        for given in own_seeds:
            is_seed = given is None or (is_whole(given) and 0 <= given < 2**63)
            require(is_seed, "seeds", given, "whole numbers from 0 to 2^63 - 1, or None")
        check_spec(policy)
        engine = self._engine_for(policy, sampling)
        num_scales = self._pipeline.schedule(DEFAULTS.aspect_ratio, size).num_scales
        items = _requests(replace(self._config, sampling=sampling), num_scales, prompts, own_seeds)
        self._num_calls += 1
        return self._in_order(engine, items, self._num_calls)

    def _in_order(self, engine: "Engine", items: Sequence[Request | Failure], call: int) -> Iterator[Image]:
        self._check_is_latest(call)
        engine.drain()  # what an earlier call left unread
        engine.submit([item for item in items if isinstance(item, Request)])
        finished: dict[RequestKey, Image | Failure] = {item.key: item for item in items if isinstance(item, Failure)}
        for item in items:
            while item.key not in finished:
                self._check_is_latest(call)
                found = engine.step(flush=True)
                finished |= {(one.request if isinstance(one, Image) else one).key: one for one in found}
            result = finished.pop(item.key)
            if isinstance(result, Failure):
                raise RowError(result.message)
            yield result

    def _check_is_latest(self, call: int) -> None:
        if call != self._num_calls:
            raise RuntimeError("a later call of generate() has taken the model over; read one at a time")

    def _engine_for(self, policy: str | None, sampling: SamplingConfig) -> "Engine":
        """The engine of the last call, or another where policy or size differ, or what a policy file was fitted for."""
        facts = replace(DEFAULTS, size=sampling.size)
        if policy is not None and policy.endswith(".json"):
            facts = replace(facts, cfg=sampling.cfg, tau=sampling.tau, aspect_ratio=sampling.aspect_ratio)
        config = replace(self._config, policy=policy, sampling=facts)
        if self._engine is None or config != self._config:
            resolved = resolve(config, StoredFiles(config.storage))  # a policy that is refused leaves all as it was
            self._engine = None
            allocator.give_back()
            self._engine = build_local_engine(config, resolved, self._pipeline)
            self._config = config
        return self._engine


def _requests(
    config: RunConfig, num_scales: int, prompts: Sequence[str], seeds: Sequence[int | None]
) -> list[Request | Failure]:
    """What the job makes of a file with these rows."""
    spec = InputSpec.of(config, num_scales, columns=pa.schema([]))
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    return [
        item
        for position, values in enumerate(rows)
        for item in requests_of(InputRow(values, None, f"prompts[{position}]"), position, spec)
    ]


def _name_of(folder: str) -> str:
    """The preset whose weights a converted folder holds."""
    try:
        return str(json.loads((Path(folder) / "config.json").read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"model: {shown(folder)} is neither one of {known} nor a folder of converted weights."
        ) from None
