"""Compares what we made with what the reference gave: logits, bits, sums, images, probes."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvar.model.bsq import latent_grid, resize_linear
from skipvar.model.pipeline import Pipeline
from skipvar.parity.case import FLIP_MARGIN, LOGIT_TOLERANCE, PIXEL_TOLERANCE, PROBE_TOLERANCE, SUM_TOLERANCE, Case
from skipvar.parity.golden import PROBE_GRID_INDEX, GoldenProbe, GoldenRun
from skipvar.parity.replay import Replay
from skipvar.skip.policy import LogisticPolicy
from skipvar.skip.probe import take_probe


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
    case.counts["bits"] += golden.numel()
    if replay.bits[scale].shape != golden.shape:
        case.problems.append(f"bits of scale {scale} have shape {tuple(replay.bits[scale].shape)}")
        return
    is_different = replay.bits[scale] != golden
    if num_different := int(is_different.sum()):
        margin = replay.margins(scale)[is_different].max().item()
        case.counts["bits_different"] += num_different
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


def compare_probe(
    case: Case, probe: GoldenProbe, policies: Mapping[str, LogisticPolicy], pipeline: Pipeline, old: Tensor, new: Tensor
) -> None:
    """Features of the probe that takes running sums `old` and `new (dv, h, w)`, what each published policy makes of
    them, and the decoded sums behind them."""
    grid = latent_grid(probe.grids[PROBE_GRID_INDEX], pipeline.config.transformer.spatial_patchify)
    (taken,) = take_probe(pipeline.decode, old[None], new[None], grid)
    ours = {
        "sobel_l1_difference": taken.sobel_change,
        "fft_high_frequency_ratio": taken.fft_high_frequency_ratio,
    }
    for name, value in ours.items():
        case.measure("probe_error", abs(value - probe.features[name]) / abs(probe.features[name]), PROBE_TOLERANCE)
    for model in sorted(probe.decisions.keys() & policies.keys()):
        case.expect_equal(f"decision of {model}", decide(policies[model], *ours.values()), probe.decisions[model])
        case.counts["decisions"] += 1
    for name, code_sum in (("old", old), ("new", new)):
        small = resize_linear(code_sum[None], grid)
        if (key := f"latent_{name}") in probe.tensors:
            case.compare("sum_error", small[0], probe.tensors[key], SUM_TOLERANCE)
        if (key := f"image_{name}_crop") in probe.tensors:
            height, width = probe.tensors[key].shape[-2:]
            with torch.inference_mode():
                image = pipeline.decode(small)[0, :, :height, :width]
            case.compare("decoded_error", image, probe.tensors[key], LOGIT_TOLERANCE)


def decide(policy: LogisticPolicy, sobel_change: float, fft_ratio: float) -> str:
    """A decision under the reference's name (`skip3` for our `skip_3`)."""
    return policy.choose((sobel_change, fft_ratio)).strategy.replace("_", "")
