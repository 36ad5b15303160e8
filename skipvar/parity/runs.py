"""Parity of generations: logits, bits, images and probes of golden runs, alone and in batches of two."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from skipvar.model.bsq import Grid, latent_grid, next_input, running_sums
from skipvar.parity.case import FREE_MARGIN, LOGIT_TOLERANCE, Case, Check
from skipvar.parity.compare import compare_bits, compare_image, compare_logits, compare_probe, compare_sums
from skipvar.parity.golden import (
    DECISION_INDEX,
    GoldenFolder,
    GoldenPart,
    GoldenProbe,
    GoldenRun,
    below,
    ratio_of,
    read_grids,
    read_json,
    unpack_bits,
)
from skipvar.parity.replay import Replay, Replayer

NUM_PAIRS = 2
"""Batches of two that are tried in each part."""


@dataclass(frozen=True)
class PartParity:
    """All comparisons of one part of a golden folder."""

    golden: GoldenFolder
    part: GoldenPart

    @cached_property
    def runs(self) -> list[GoldenRun]:
        """The generations in the part's folder `runs`, by name; read once."""
        return self.part.runs()

    @cached_property
    def replayer(self) -> Replayer:
        """Holds the part's model, which is loaded when first asked for."""
        return Replayer(self.part.load_pipeline())

    def judged(self) -> Iterator[tuple[str, Check]]:
        """The cases that decide, by name."""
        name = self.part.name
        for run in self.runs:
            yield f"{name}/runs/{run.name}", partial(self._check_run, run=run)
        for pair in pairs(self.runs):
            yield f"{name}/batch/{'+'.join(run.name for run in pair)}", partial(self._check_pair, pair=pair)
        for file, entries in self.part.checks().items():
            for strategy, noted in entries.items():
                if matching := _noted_runs(self.runs, entries, strategy):
                    yield f"{name}/{file}/{strategy}", partial(self._check_noted, matching=matching, noted=noted)
        if (self.part.folder / "intermediates.safetensors").is_file():
            yield f"{name}/intermediates", self._check_intermediates
        if (self.part.folder / "probes.json").is_file():
            for content in read_json(self.part.folder / "probes.json"):
                yield f"{name}/probes/{content['index']}", partial(self._check_probe, content=content)

    def unjudged(self) -> Iterator[tuple[str, Check]]:
        """Runs of the reference with its own roundings to bfloat16, fed with their own bits: for a loose comparison."""
        for folder in sorted(path for path in self.part.folder.glob("runs_*") if path.is_dir()):
            for run in self.part.runs(folder.name):
                yield f"{self.part.name}/{folder.name}/{run.name}", partial(self._report_run, run=run)

    def _make(self, run: GoldenRun) -> Replay:
        """The run as it is judged: by itself, or with golden bits fed back where its margins are too small for that."""
        return self.replayer.run(run, None if run.min_margin >= FREE_MARGIN else known_bits(run, self.runs))

    def _check_run(self, case: Case, run: GoldenRun) -> None:
        replay, bits = self._make(run), known_bits(run, self.runs)
        case.expect_equal("scales run", len(replay.logits), int(run.content["n_scales_run"]))
        for scale in range(len(replay.logits)):
            compare_logits(case, run, replay, scale, LOGIT_TOLERANCE)
            if scale in bits:
                compare_bits(case, replay, scale, bits[scale], is_free=run.min_margin >= FREE_MARGIN)
        compare_sums(case, run, replay)
        if any(name.startswith(("image_", "decoded_")) for name in run.tensors):
            compare_image(case, run.tensors, self.replayer.pixels(replay), replay.decoded)
        if probe := run.probe:
            old, new = replay.sums[DECISION_INDEX - 1], replay.sums[DECISION_INDEX]
            compare_probe(case, probe, self.golden.policies, self.replayer.pipeline, old, new)

    def _report_run(self, case: Case, run: GoldenRun) -> None:
        replay = self.replayer.run(run, run.bits)
        for scale in range(len(replay.logits)):
            compare_logits(case, run, replay, scale, None)
        case.counts["bits"] += sum(bits.numel() for bits in run.bits.values())
        case.counts["bits_different"] += sum(int((replay.bits[k] != bits).sum()) for k, bits in run.bits.items())

    def _check_pair(self, case: Case, pair: tuple[GoldenRun, GoldenRun]) -> None:
        """Two images in one batch are, bit for bit, what they are alone."""
        together = self.replayer.run_together(pair)
        self.replayer.decode(together)
        for run, replay in zip(pair, together, strict=True):
            alone = self._make(run)
            for scale, bits in enumerate(alone.bits):
                compare_bits(case, replay, scale, bits, is_free=True)
                case.counts["logits_different"] += int((replay.logits[scale] != alone.logits[scale]).sum())
            is_equal = torch.equal(self.replayer.pixels(replay), self.replayer.pixels(alone))
            case.expect_equal(f"image of {run.name}", is_equal, True)

    def _check_noted(self, case: Case, matching: Sequence[GoldenRun], noted: Mapping[str, Any]) -> None:
        """How many scales a strategy runs, how many are those of the plain run, and whether the image is."""
        for run in matching:
            replay = self._make(run)
            case.expect_equal("scales run", len(replay.bits), noted["scales_run"])
            for plain in plain_twins(run, self.runs):
                whole = self._make(plain)
                equal = [torch.equal(a, b) for a, b in zip(replay.bits, whole.bits, strict=False)]
                if "first_scales" in noted:
                    case.expect_equal("scales equal to the plain run", all(equal[: noted["first_scales"]]), True)
                if "whole_run_equal" in noted:
                    is_equal = all(equal) and len(equal) == len(whole.bits)
                    case.expect_equal("whole run equal", is_equal, noted["whole_run_equal"])
                if "image_equal_to_plain" in noted:  # decoding is a function of the sum
                    assert replay.code_sum is not None and whole.code_sum is not None
                    is_equal = torch.equal(replay.code_sum, whole.code_sum)
                    case.expect_equal("image equal to the plain run's", is_equal, noted["image_equal_to_plain"])
                case.counts["comparisons"] += 1

    def _check_intermediates(self, case: Case) -> None:
        golden = load_file(self.part.folder / "intermediates.safetensors")
        run = self._run_of(below("word_embed_input.scale", golden))
        ours = self.replayer.intermediates(run, known_bits(run, self.runs))
        for name in sorted(golden):
            if name not in ours:
                case.problems.append(f"nothing here is called {name}")
                continue
            # Residual streams grow to tens: the tolerance is relative to the largest value there.
            size = max(1.0, golden[name].abs().max().item())
            case.compare("intermediate_error", ours[name] / size, golden[name] / size, LOGIT_TOLERANCE)
        case.counts["tensors"] += len(golden)

    def _run_of(self, inputs: Mapping[str, Tensor]) -> GoldenRun:
        """The plain run whose bits give the inputs `(B, L, d)` that are stored by scale; the file does not name it."""
        patchify = self.part.config.transformer.spatial_patchify
        last = max(map(int, inputs), default=0)

        def distance(run: GoldenRun) -> float:
            if last >= len(run.grids) or any(scale not in run.bits for scale in range(last)):
                return math.inf
            sums = self._sums(run.bits, run.grids, last)
            given = {scale: next_input(sums[int(scale) - 1], run.grids[int(scale)], patchify) for scale in inputs}
            if any(given[scale].shape != inputs[scale].shape for scale in inputs):
                return math.inf
            return max((float((given[scale] - inputs[scale]).abs().max()) for scale in inputs), default=0.0)

        return min((run for run in self.runs if run.forced_strategy is None), key=distance)

    def _sums(self, bits: Mapping[int, Tensor], grids: Sequence[Grid], num_scales: int) -> list[Tensor]:
        """Running code sums `(1, dv, h, w)` of the first scales' bits."""
        patchify = self.part.config.transformer.spatial_patchify
        stored = [bits[scale][None] for scale in range(num_scales)]
        return running_sums(stored, grids[:num_scales], patchify, latent_grid(grids[-1], patchify)) if stored else []

    def _check_probe(self, case: Case, content: Mapping[str, Any]) -> None:
        """The probe of stored bits, without the transformer."""
        tensors = below(f"probe{content['index']}_", load_file(self.part.folder / "probes.safetensors"))
        bits, grids = unpack_bits(tensors), read_grids(content["schedule"])
        case.expect_equal("ratio", ratio_of(grids), float(content["h_div_w"]))
        *_, old, new = self._sums(bits, grids, len(bits))
        probe = GoldenProbe(grids, content, content.get("natural_decision", {}), tensors)
        compare_probe(case, probe, self.golden.policies, self.replayer.pipeline, old[0], new[0])


def plain_twins(run: GoldenRun, runs: Sequence[GoldenRun]) -> list[GoldenRun]:
    """The runs without a strategy that are otherwise the same."""
    return [twin for twin in runs if twin.forced_strategy is None and twin.same_but_strategy == run.same_but_strategy]


def known_bits(run: GoldenRun, runs: Sequence[GoldenRun]) -> dict[int, Tensor]:
    """Bits of a run by scale; those of early scales that it does not store are its plain twin's."""
    bits: dict[int, Tensor] = {}
    for plain in plain_twins(run, runs):
        bits |= {scale: own for scale, own in plain.bits.items() if scale <= DECISION_INDEX}
    return dict(sorted((bits | run.bits).items()))


def pairs(runs: Sequence[GoldenRun]) -> list[tuple[GoldenRun, GoldenRun]]:
    """A few pairs that can share a batch: same schedule, modes and guidance layers; short, and unlike in the rest."""

    def can_share(a: GoldenRun, b: GoldenRun) -> bool:
        is_guided = [any(cfg != 1 for cfg in run.request().cfg) for run in (a, b)]
        return (
            a.grids == b.grids
            and a.strategy().modes == b.strategy().modes
            and a.guidance_layers == b.guidance_layers
            and is_guided[0] == is_guided[1]
        )

    def rank(pair: tuple[GoldenRun, GoldenRun]) -> tuple[int, int]:
        a, b = (run.request() for run in pair)
        unlike = (a.prompt != b.prompt) + (a.negative_prompt != b.negative_prompt) + (a.cfg != b.cfg) + (a.tau != b.tau)
        return sum(height * width for height, width in pair[0].grids), -unlike

    free = [run for run in runs if run.min_margin >= FREE_MARGIN and run.forced_strategy is None]
    return sorted((pair for pair in combinations(free, 2) if can_share(*pair)), key=rank)[:NUM_PAIRS]


def _noted_runs(runs: Sequence[GoldenRun], entries: Mapping[str, Any], strategy: str) -> list[GoldenRun]:
    """The forced runs that a file of checks speaks of: those whose schedule is as long as its unskipped runs were."""
    whole = [entry["scales_run"] for name, entry in entries.items() if not name.startswith("skip")]
    num_scales = max(whole, default=max((len(run.grids) for run in runs if run.forced_strategy), default=0))
    return [run for run in runs if run.forced_strategy == strategy and len(run.grids) == num_scales]
