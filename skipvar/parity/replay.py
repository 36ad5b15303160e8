"""Makes the images of golden runs with our own code, and remembers what every scale gave."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from skipvar.engine.sampler import Sampler, SamplingRules, bit_thresholds, sample_bits
from skipvar.model.pipeline import Pipeline, to_uint8
from skipvar.model.transformer import Transformer
from skipvar.parity.golden import DECISION_INDEX, GoldenRun

_Pick = Callable[[tuple[Any, ...], Tensor], Tensor]


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
            (self._replays[key],) = self.run_together([run], {scale: bits[None] for scale, bits in forced.items()})
        return self._replays[key]

    def run_together(self, runs: Sequence[GoldenRun], forced: Mapping[int, Tensor] | None = None) -> list[Replay]:
        """Several runs of one schedule and strategy as one batch; `forced` bits `(B, L, d)` by scale are fed back."""
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

    def intermediates(self, run: GoldenRun, forced: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """What the modules of a guided run take and give, under the golden names; the run is made anew."""
        calls: dict[str, list[Tensor]] = defaultdict(list)

        def record(name: str, module: nn.Module, pick: _Pick) -> RemovableHandle:
            return module.register_forward_hook(lambda _, args, out: calls[name].append(pick(args, out)))

        handles = [record(*recorded) for recorded in _recorded(self.pipeline.transformer)]
        try:
            self.run_together([run], {scale: bits[None] for scale, bits in forced.items()})
        finally:
            for handle in handles:
                handle.remove()
        found: dict[str, Tensor] = {}
        for name, tensors in calls.items():
            if name.startswith(
                "pre."
            ):  # the text's own modules run once a branch: conditional, then unconditional rows
                found[name] = torch.cat(tensors)
            elif name == "word_embed_input":  # the first scale has no tokens to embed
                found |= {f"{name}.scale{scale}": tensor for scale, tensor in enumerate(tensors, start=1)}
            else:
                found |= {f"scale{scale}.{name}": tensor for scale, tensor in enumerate(tensors)}
        return found


def _recorded(transformer: Transformer) -> Iterator[tuple[str, nn.Module, _Pick]]:
    """Golden name, module, and which of what the module takes and gives has that name."""

    def taken(args: tuple[Any, ...], _: Tensor) -> Tensor:
        return args[0]

    def given(_: tuple[Any, ...], out: Tensor) -> Tensor:
        return out

    yield "pre.text_norm", transformer.text_up, lambda args, _: args[0][0]
    yield "pre.ca_kv", transformer.text_down, lambda _, out: out[0]
    yield "pre.sos", transformer.text_pooling, given
    yield "pre.gss", transformer.shared_modulation, lambda _, out: out.unflatten(-1, (1, 6, -1))
    yield "word_embed_input", transformer.token_embedding, taken
    yield "head_nm.out", transformer.head, taken
    yield "head.out", transformer.head, given
    blocks: Any = transformer.blocks
    for index, block in enumerate(blocks):
        yield f"block{index}.in", block, taken
        yield f"block{index}.out", block, given
        for name, module in (("sa", block.self_attention), ("ca", block.cross_attention), ("ffn", block.mlp)):
            yield f"block{index}.{name}", module, given
