"""Compares what we made with what the reference gave: logits, bits, sums, images, probes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvar.model.bsq import Grid, latent_grid, resize_linear
from skipvar.parity.case import (
    FLIP_MARGIN,
    LOGIT_TOLERANCE,
    PIXEL_TOLERANCE,
    PROBE_TOLERANCE,
    SUM_TOLERANCE,
    Case,
)
from skipvar.parity.golden import DECISION_INDEX, PROBE_GRID_INDEX, GoldenFolder, GoldenRun
from skipvar.parity.replay import Replay, Replayer
from skipvar.parity.tables import decide


def compare_logits(case: Case, run: GoldenRun, replay: Replay, scale: int, tolerance: float | None) -> None:
    """All logits of a scale, or the rows that the run stores, and what its JSON says of all of them."""
    tensors, logits, suffix = run.tensors, replay.logits[scale], f"{scale:02}"
    if f"logits_{suffix}" in tensors:
        case.compare("logit_error", logits, tensors[f"logits_{suffix}"], tolerance)
    elif f"logits_sel_{suffix}" in tensors:
        rows = tensors[f"logits_rows_{suffix}"].long()
        case.compare("logit_error", logits[rows], tensors[f"logits_sel_{suffix}"], tolerance)
    noted = run.content["scales"][scale]["logits"]
    values = logits.double()
    ours = {"mean": values.mean().item(), "std": values.std().item(), "absmax": values.abs().max().item()}
    for name in ours.keys() & noted.keys():
        case.measure("logit_error", abs(ours[name] - noted[name]), tolerance)


def compare_bits(case: Case, replay: Replay, scale: int, golden: Tensor, *, is_free: bool) -> None:
    """Counts bits `(L, d)` of a scale that differ: a problem in a free run, and at margins of `FLIP_MARGIN` or more."""
    case.count("bits", golden.numel())
    if replay.bits[scale].shape != golden.shape:
        case.problems.append(f"bits of scale {scale} have shape {tuple(replay.bits[scale].shape)}")
        return
    is_different = replay.bits[scale] != golden
    if num_different := int(is_different.sum()):
        margin = replay.margins(scale)[is_different].max().item()
        case.count("bits_different", num_different)
        case.measure("margin_of_different_bits", margin)
        if is_free or not margin < FLIP_MARGIN:
            case.problems.append(f"{num_different} bits of scale {scale} differ, at margins up to {margin:.1e}")


def compare_sums(case: Case, run: GoldenRun, replay: Replay) -> None:
    """The last running code sum `(dv, h, w)`: all of it, or every fourth cell along both axes, as the run stores it."""
    assert replay.code_sum is not None
    if "codes" in run.tensors:
        case.compare("sum_error", replay.code_sum, run.tensors["codes"], SUM_TOLERANCE)
    if "codes_every4" in run.tensors:
        case.compare("sum_error", replay.code_sum[:, ::4, ::4], run.tensors["codes_every4"], SUM_TOLERANCE)


def compare_image(case: Case, golden: Mapping[str, Tensor], pixels: Tensor, decoded: Tensor | None) -> None:
    """`pixels (H, W, 3)` uint8 RGB; the golden ones are BGR."""
    bgr = pixels.flip(-1).int()
    if "image_bgr" in golden:
        case.compare("pixel_difference", bgr, golden["image_bgr"].int(), PIXEL_TOLERANCE)
    for name, corner in (("tl", slice(None, 64)), ("br", slice(-64, None))):
        if f"image_bgr_crop_{name}" in golden:
            crop = golden[f"image_bgr_crop_{name}"].int()
            case.compare("pixel_difference", bgr[corner, corner], crop, PIXEL_TOLERANCE)
    if "image_bgr_blockmean" in golden:
        means = golden["image_bgr_blockmean"]
        side = bgr.shape[0] // means.shape[0]
        blocks = F.avg_pool2d(bgr.permute(2, 0, 1)[None].float(), side)[0].permute(1, 2, 0)
        case.compare("pixel_difference", blocks, means, PIXEL_TOLERANCE)
    if "decoded_rgb_crop" in golden and decoded is not None:
        height, width = golden["decoded_rgb_crop"].shape[-2:]
        case.compare("decoded_error", decoded[:, :height, :width], golden["decoded_rgb_crop"], LOGIT_TOLERANCE)


def compare_probe(case: Case, golden: GoldenFolder, run: GoldenRun, replay: Replay, replayer: Replayer) -> None:
    """Features of a run's probe, the policies' decisions by them, and the sums and decoded corners behind them."""
    old, new = replay.sums[DECISION_INDEX - 1], replay.sums[DECISION_INDEX]
    compare_features(case, golden, replayer, (old, new), run.grids, run.content["probe_features"], run.content)
    compare_probe_tensors(case, replayer, (old, new), run.grids, run.tensors, "probe_")


def compare_features(
    case: Case,
    golden: GoldenFolder,
    replayer: Replayer,
    sums: tuple[Tensor, Tensor],
    grids: Sequence[Grid],
    features: Mapping[str, float],
    content: Mapping[str, Any],
) -> None:
    """Features of the probe, and what each published policy makes of ours."""
    probe = replayer.probe(*sums, grids)
    ours = {"sobel_l1_difference": probe.sobel_change, "fft_high_frequency_ratio": probe.fft_high_frequency_ratio}
    for name, value in ours.items():
        case.measure("probe_error", abs(value - features[name]) / abs(features[name]), PROBE_TOLERANCE)
    for model, decision in content.get("natural_decision", {}).items():
        if model in golden.policies:
            case.expect_equal(f"decision of {model}", decide(golden.policies[model], *ours.values()), decision)
            case.count("decisions", 1)


def compare_probe_tensors(
    case: Case,
    replayer: Replayer,
    sums: tuple[Tensor, Tensor],
    grids: Sequence[Grid],
    golden: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """The resized sums that the probe decodes, and corners of what comes out."""
    grid = latent_grid(grids[PROBE_GRID_INDEX], replayer.pipeline.config.transformer.spatial_patchify)
    for name, code_sum in zip(("old", "new"), sums, strict=True):
        small = resize_linear(code_sum[None], grid)
        if (key := f"{prefix}latent_{name}") in golden:
            case.compare("sum_error", small[0], golden[key], SUM_TOLERANCE)
        if (key := f"{prefix}image_{name}_crop") in golden:
            height, width = golden[key].shape[-2:]
            with torch.inference_mode():
                image = replayer.pipeline.decode(small)[0, :, :height, :width]
            case.compare("decoded_error", image, golden[key], LOGIT_TOLERANCE)
