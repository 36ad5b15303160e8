"""Makes the images of golden runs with our own code, and remembers what every scale gave."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipvar.engine.sampler import Sampler, SamplingRules, bit_thresholds, sample_bits
from skipvar.model.bsq import Grid, latent_grid
from skipvar.model.pipeline import Pipeline, to_uint8
from skipvar.parity.golden import DECISION_INDEX, PROBE_GRID_INDEX, GoldenRun
from skipvar.skip.probe import take_probe
from skipvar.types import Probe


@dataclass
class Replay:
    """One image as we made it."""

    logits: list[Tensor] = field(default_factory=list)
    """`(L, 2d)` float32 of each scale that ran."""
    bits: list[Tensor] = field(default_factory=list)
    """`(L, d)` bool: what we sampled, also where other bits were fed back."""
    thresholds: list[Tensor] = field(default_factory=list)
    """`(L, d)` float32."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """Running code sums `(dv, h, w)` by scale: those that the probe compares."""
    code_sum: Tensor | None = None
    """The last running code sum `(dv, h, w)`."""
    decoded: Tensor | None = None
    """`(3, H, W)` float32 in [-1, 1], once it was asked for."""

    def margins(self, scale: int) -> Tensor:
        """How far each bit's logit difference is from its threshold: `(L, d)`."""
        pairs = self.logits[scale].unflatten(-1, (-1, 2))
        return (pairs[..., 1] - pairs[..., 0] - self.thresholds[scale]).abs()


class Replayer:
    """A part's model, with the replays of runs that were made already."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._replays: dict[Any, Replay] = {}

    def run(self, run: GoldenRun, forced: Mapping[int, Tensor] | None = None) -> Replay:
        """A run by itself; `forced` bits `(L, d)` by scale are fed back in place of those sampled."""
        forced = forced or {}
        key = (run.same_but_strategy, run.strategy().modes, tuple((k, forced[k].numpy().tobytes()) for k in forced))
        if key not in self._replays:
            (self._replays[key],) = self._run_batch([run], {scale: bits[None] for scale, bits in forced.items()})
        return self._replays[key]

    def run_together(self, runs: Sequence[GoldenRun]) -> list[Replay]:
        """Several runs of one schedule and strategy as one batch, sampled freely."""
        return self._run_batch(runs, {})

    def _run_batch(self, runs: Sequence[GoldenRun], forced: Mapping[int, Tensor]) -> list[Replay]:
        first = runs[0]
        rules = SamplingRules(size=str(len(first.grids)), guidance_layers=first.guidance_layers)
        sampler = Sampler(self.pipeline, rules)
        images = [sampler.start_image(run.request()) for run in runs]
        schedule, num_rows = images[0].schedule, len(images) * (1 + images[0].is_guided)
        num_tokens = schedule.first_token(schedule.num_scales)
        cache = sampler.new_cache(num_rows * num_tokens)
        cache.begin(num_rows, num_tokens)
        batch = sampler.begin(images, cache)
        replays = [Replay() for _ in runs]
        # A second stream of the same seed: the sampler keeps its thresholds to itself.
        twins = [torch.Generator().manual_seed(image.request.seed) for image in images]
        probed = (DECISION_INDEX - 1, DECISION_INDEX)
        for step in sampler.run(batch, first.strategy().modes, keep_sums=probed, forced_bits=forced):
            for index, replay in enumerate(replays):
                request, logits = images[index].request, step.logits[index]
                shape = (logits.shape[0], logits.shape[1] // 2)
                replay.logits.append(logits)
                replay.thresholds.append(bit_thresholds(twins[index], shape, request.top_k, request.top_p))
                replay.bits.append(sample_bits(logits, replay.thresholds[-1]))
        for index, replay in enumerate(replays):
            replay.code_sum = batch.code_sum[index]
            replay.sums = {scale: code_sum[index] for scale, code_sum in batch.history.items()}
        return replays

    def decode(self, replays: Sequence[Replay]) -> None:
        """Decodes the final sums of replays of one schedule, as one batch."""
        sums = [replay.code_sum for replay in replays if replay.code_sum is not None]
        with torch.inference_mode():
            for replay, decoded in zip(replays, self.pipeline.decode(torch.stack(sums)), strict=True):
                replay.decoded = decoded

    def pixels(self, replay: Replay) -> Tensor:
        """The image `(H, W, 3)` uint8 RGB."""
        if replay.decoded is None:
            self.decode([replay])
        assert replay.decoded is not None
        return to_uint8(replay.decoded[None])[0]

    def probe(self, old: Tensor, new: Tensor, grids: Sequence[Grid]) -> Probe:
        """The probe of two running sums `(dv, h, w)`, at the grid that the reference takes."""
        grid = latent_grid(grids[PROBE_GRID_INDEX], self.pipeline.config.transformer.spatial_patchify)
        return take_probe(self.pipeline.decode, old[None], new[None], grid)[0]

    def intermediates(self, run: GoldenRun, forced: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """What the modules of a guided run take and give, under the golden names; the run is made anew."""
        recorder = _Recorder(self.pipeline.transformer)
        try:
            self._run_batch([run], {scale: bits[None] for scale, bits in forced.items()})
        finally:
            recorder.remove()
        return recorder.tensors


class _Recorder:
    """Hooks on the transformer's modules."""

    def __init__(self, transformer: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._scale = -1
        self._handles = [hook for part in (self._text(transformer), self._scales(transformer)) for hook in part]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _text(self, transformer: Any) -> Iterator[Any]:
        """The text's own modules run once a branch: conditional, then unconditional rows."""

        def append(name: str, pick: Callable[[Any, Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _, args, out: self._append(f"pre.{name}", pick(args, out))

        yield transformer.text_up.register_forward_hook(append("text_norm", lambda args, _: args[0][0]))
        yield transformer.text_down.register_forward_hook(append("ca_kv", lambda _, out: out[0]))
        yield transformer.text_pooling.register_forward_hook(append("sos", lambda _, out: out))
        unflatten = append("gss", lambda _, out: out.unflatten(-1, (1, 6, -1)))
        yield transformer.shared_modulation.register_forward_hook(unflatten)

    def _append(self, name: str, rows: Tensor) -> None:
        self.tensors[name] = torch.cat([self.tensors[name], rows]) if name in self.tensors else rows

    def _scales(self, transformer: Any) -> Iterator[Any]:
        yield transformer.blocks[0].register_forward_pre_hook(lambda *_: self._next_scale())
        yield transformer.token_embedding.register_forward_pre_hook(self._keep_codes)
        yield self._record(transformer.head, "head_nm.out", "head.out")
        for index, block in enumerate(transformer.blocks):
            yield self._record(block, f"block{index}.in", f"block{index}.out")
            yield self._record(block.self_attention, None, f"block{index}.sa")
            yield self._record(block.cross_attention, None, f"block{index}.ca")
            yield self._record(block.mlp, None, f"block{index}.ffn")

    def _keep_codes(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.tensors[f"word_embed_input.scale{self._scale + 1}"] = args[0]

    def _next_scale(self) -> None:
        self._scale += 1

    def _record(self, module: nn.Module, taken: str | None, given: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if taken:
                self.tensors[f"scale{self._scale}.{taken}"] = args[0]
            self.tensors[f"scale{self._scale}.{given}"] = out

        return module.register_forward_hook(hook)
