"""Parity of generations: logits, bits, images and probes of golden runs, alone and in batches of two."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from skipvar.model.bsq import latent_grid, next_input, running_sums
from skipvar.parity.case import FREE_MARGIN, LOGIT_TOLERANCE, Case, Check
from skipvar.parity.compare import (
    compare_bits,
    compare_features,
    compare_image,
    compare_logits,
    compare_probe,
    compare_probe_tensors,
    compare_sums,
)
from skipvar.parity.golden import (
    DECISION_INDEX,
    GoldenFolder,
    GoldenPart,
    GoldenRun,
    ratio_of,
    read_grids,
    read_json,
    unpack_bits,
)
from skipvar.parity.replay import Replay, Replayer

NUM_PAIRS = 2
"""Batches of two that are tried in each part."""


def part_checks(golden: GoldenFolder, part: GoldenPart) -> Iterator[tuple[str, Check]]:
    """The judged cases of a part, by name. The part's model is loaded once, by the first case that needs it."""
    subject = Subject(golden, part)
    for run in subject.runs:
        yield f"{part.name}/runs/{run.name}", partial(_check_run, subject=subject, run=run)
    for pair in pairs(subject.runs):
        name = f"{part.name}/batch/{'+'.join(run.name for run in pair)}"
        yield name, partial(_check_pair, subject=subject, pair=pair)
    for file, entries in part.checks().items():
        for strategy, noted in entries.items():
            if matching := _noted_runs(subject.runs, entries, strategy):
                check = partial(_check_noted, subject=subject, matching=matching, noted=noted)
                yield f"{part.name}/{file}/{strategy}", check
    if (part.folder / "intermediates.safetensors").is_file():
        yield f"{part.name}/intermediates", partial(_check_intermediates, subject=subject)
    if (part.folder / "probes.json").is_file():
        for probe in read_json(part.folder / "probes.json"):
            yield f"{part.name}/probes/{probe['index']}", partial(_check_probe, subject=subject, content=probe)


def unjudged_checks(golden: GoldenFolder, part: GoldenPart) -> Iterator[tuple[str, Check]]:
    """Runs of the reference with its own roundings to bfloat16, fed with their own bits: for a loose comparison."""
    subject = Subject(golden, part)
    for folder in sorted(path for path in part.folder.glob("runs_*") if path.is_dir()):
        for run in part.runs(folder.name):
            yield f"{part.name}/{folder.name}/{run.name}", partial(_report_run, subject=subject, run=run)


@dataclass(frozen=True)
class Subject:
    """What the cases of one part share."""

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

    def make(self, run: GoldenRun) -> Replay:
        """The run as it is judged: by itself, or with golden bits fed back where its margins are too small for that."""
        return self.replayer.run(run, None if run.min_margin >= FREE_MARGIN else known_bits(run, self.runs))


def _report_run(case: Case, subject: Subject, run: GoldenRun) -> None:
    replay = subject.replayer.run(run, run.bits)
    for scale in range(len(replay.logits)):
        compare_logits(case, run, replay, scale, None)
    case.count("bits", sum(bits.numel() for bits in run.bits.values()))
    case.count("bits_different", sum(int((replay.bits[k] != bits).sum()) for k, bits in run.bits.items()))


def plain_twins(run: GoldenRun, runs: Sequence[GoldenRun]) -> list[GoldenRun]:
    """The runs without a strategy that are otherwise the same."""
    return [twin for twin in runs if twin.forced_strategy is None and twin.same_but_strategy == run.same_but_strategy]


def known_bits(run: GoldenRun, runs: Sequence[GoldenRun]) -> dict[int, Tensor]:
    """Bits of a run by scale; those of early scales that it does not store are its plain twin's."""
    bits: dict[int, Tensor] = {}
    for plain in plain_twins(run, runs):
        bits |= {scale: own for scale, own in plain.bits.items() if scale <= DECISION_INDEX}
    return dict(sorted((bits | run.bits).items()))


def _check_run(case: Case, subject: Subject, run: GoldenRun) -> None:
    replay, bits = subject.make(run), known_bits(run, subject.runs)
    case.expect_equal("scales run", len(replay.logits), int(run.content["n_scales_run"]))
    for scale in range(len(replay.logits)):
        compare_logits(case, run, replay, scale, LOGIT_TOLERANCE)
        if scale in bits:
            compare_bits(case, replay, scale, bits[scale], is_free=run.min_margin >= FREE_MARGIN)
    compare_sums(case, run, replay)
    if any(name.startswith(("image_", "decoded_")) for name in run.tensors):
        compare_image(case, run.tensors, subject.replayer.pixels(replay), replay.decoded)
    if "probe_features" in run.content:
        compare_probe(case, subject.golden, run, replay, subject.replayer)


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


def _check_pair(case: Case, subject: Subject, pair: tuple[GoldenRun, GoldenRun]) -> None:
    """Two images in one batch are, bit for bit, what they are alone."""
    replayer = subject.replayer
    together = replayer.run_together(pair)
    replayer.decode(together)
    for run, replay in zip(pair, together, strict=True):
        alone = subject.make(run)
        for scale, bits in enumerate(alone.bits):
            compare_bits(case, replay, scale, bits, is_free=True)
            case.count("logits_different", int((replay.logits[scale] != alone.logits[scale]).sum()))
        case.expect_equal(f"image of {run.name}", torch.equal(replayer.pixels(replay), replayer.pixels(alone)), True)


def _noted_runs(runs: Sequence[GoldenRun], entries: Mapping[str, Any], strategy: str) -> list[GoldenRun]:
    """The forced runs that a file of checks speaks of: those whose schedule is as long as its unskipped runs were."""
    whole = [entry["scales_run"] for name, entry in entries.items() if not name.startswith("skip")]
    num_scales = max(whole, default=max((len(run.grids) for run in runs if run.forced_strategy), default=0))
    return [run for run in runs if run.forced_strategy == strategy and len(run.grids) == num_scales]


def _check_noted(case: Case, subject: Subject, matching: Sequence[GoldenRun], noted: Mapping[str, Any]) -> None:
    """How many scales a strategy runs, how many are those of the plain run, and whether the image is."""
    for run in matching:
        replay = subject.make(run)
        case.expect_equal("scales run", len(replay.bits), noted["scales_run"])
        for plain in plain_twins(run, subject.runs):
            whole = subject.make(plain)
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
            case.count("comparisons", 1)


def _check_intermediates(case: Case, subject: Subject) -> None:
    golden = load_file(subject.part.folder / "intermediates.safetensors")
    run = _run_of_intermediates(golden, subject)
    ours = subject.replayer.intermediates(run, known_bits(run, subject.runs))
    for name in sorted(golden):
        if name not in ours:
            case.problems.append(f"nothing here is called {name}")
            continue
        # Residual streams grow to tens: the tolerance is relative to the largest value there.
        size = max(1.0, golden[name].abs().max().item())
        case.compare("intermediate_error", ours[name] / size, golden[name] / size, LOGIT_TOLERANCE)
    case.count("tensors", len(golden))


def _run_of_intermediates(golden: Mapping[str, Tensor], subject: Subject) -> GoldenRun:
    """The run whose bits give the stored inputs; the file does not name it."""
    patchify = subject.part.config.transformer.spatial_patchify
    marker = "word_embed_input.scale"
    inputs = {int(name.removeprefix(marker)): tensor for name, tensor in golden.items() if name.startswith(marker)}

    def distance(run: GoldenRun) -> float:
        last = max(inputs, default=0)
        if last >= len(run.grids) or any(scale not in run.bits for scale in range(last)):
            return float("inf")
        bits = [run.bits[scale][None] for scale in range(last)]
        sums = running_sums(bits, run.grids[:last], patchify, latent_grid(run.grids[-1], patchify)) if bits else []
        given = {scale: next_input(sums[scale - 1], run.grids[scale], patchify) for scale in inputs}
        if any(given[scale].shape != inputs[scale].shape for scale in inputs):
            return float("inf")
        return max((float((given[scale] - inputs[scale]).abs().max()) for scale in inputs), default=0.0)

    return min((run for run in subject.runs if run.forced_strategy is None), key=distance)


def _check_probe(case: Case, subject: Subject, content: Mapping[str, Any]) -> None:
    """The probe of stored bits, without the transformer."""
    tensors, prefix = load_file(subject.part.folder / "probes.safetensors"), f"probe{content['index']}_"
    bits, grids = unpack_bits(tensors, prefix), read_grids(content["schedule"])
    case.expect_equal("ratio", ratio_of(grids), float(content["h_div_w"]))
    patchify = subject.part.config.transformer.spatial_patchify
    stored = [bits[scale][None] for scale in range(len(bits))]
    sums = running_sums(stored, grids[: len(stored)], patchify, latent_grid(grids[-1], patchify))
    old_new = (sums[-2][0], sums[-1][0])
    compare_features(case, subject.golden, subject.replayer, old_new, grids, content, content)
    compare_probe_tensors(case, subject.replayer, old_new, grids, tensors, prefix)
