"""Bits, codes and the running sum, against the golden runs and against themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from skipvar.model.bsq import (
    add_code,
    bits_to_code,
    code_to_bits,
    latent_grid,
    next_input,
    quantize,
    resize_linear,
    running_sums,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GRIDS = [(n, n) for n in (1, 2, 3, 5, 8)]


def golden_run(part: str, name: str) -> tuple[dict[str, Tensor], list[tuple[int, int]], list[Tensor]]:
    tensors = load_file(GOLDEN / part / "runs" / f"{name}.safetensors")
    spec = json.loads((GOLDEN / part / "runs" / f"{name}.json").read_text())["spec"]
    grids = [(h, w) for _, h, w in spec["schedule"]]
    bits = [
        torch.from_numpy(np.unpackbits(tensors[f"bits_packed_{k:02}"].numpy(), axis=-1))[None].bool()
        for k in range(len(grids))
    ]
    return tensors, grids, bits


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("main", "a_p0_cfg4_tau05"),
        ("main", "c_hw1250_p1"),
        ("main", "c_hw0666_025M_p2"),
        ("main", "f_1M_p0_cfg4_tau05"),
        ("patchify", "a_p0"),
        ("patchify", "c_hw0666_p0"),
    ],
)
def test_running_sum_of_golden_bits_is_the_golden_one(part: str, name: str) -> None:
    tensors, grids, bits = golden_run(part, name)
    patchify = part == "patchify"
    code_sum = running_sums(bits, grids, patchify, latent_grid(grids[-1], patchify))[-1][0]
    if "codes" in tensors:
        difference = (code_sum - tensors["codes"]).abs().max()
    else:
        difference = (code_sum[:, ::4, ::4] - tensors["codes_every4"]).abs().max()
    print(f"{part}/{name}: largest difference {difference:.2e}")
    assert difference < 2e-6


def test_next_inputs_are_the_golden_ones() -> None:
    _, grids, bits = golden_run("main", "a_p0_cfg4_tau05")
    golden = load_file(GOLDEN / "main" / "intermediates.safetensors")
    sums = running_sums(bits, grids, False, grids[-1])
    compared = 0
    for k in range(1, len(grids)):
        name = f"word_embed_input.scale{k}"
        if name in golden:
            torch.testing.assert_close(next_input(sums[k - 1], grids[k], False), golden[name], atol=2e-6, rtol=0)
            compared += 1
    assert compared


@pytest.mark.parametrize("patchify", [False, True])
def test_codes_and_bits_are_inverse(patchify: bool) -> None:
    bits = torch.rand(3, 12, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    code = bits_to_code(bits, (3, 4), patchify)
    assert code.shape == ((3, 2, 6, 8) if patchify else (3, 8, 3, 4))
    torch.testing.assert_close(code.abs(), torch.full_like(code, code.shape[1] ** -0.5))
    assert torch.equal(code_to_bits(code, patchify), bits)
    if patchify:  # channel 4a + 2p + q of cell (y, x) lies at channel a, cell (2y + p, 2x + q)
        a, p, q, y, x = 1, 0, 1, 2, 3
        assert bool(code[0, a, 2 * y + p, 2 * x + q] > 0) == bool(bits[0, y * 4 + x, 4 * a + 2 * p + q])


def test_add_code_at_the_last_scale_adds_it_unchanged() -> None:
    code_sum, code = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    assert torch.equal(add_code(code_sum, code, is_last=True), code_sum + code)
    assert torch.equal(add_code(code_sum, code, is_last=False), code_sum + code)
    small = torch.randn(2, 4, 2, 2)
    assert torch.equal(add_code(code_sum, small, is_last=False), code_sum + resize_linear(small, (5, 5)))


@pytest.mark.parametrize("patchify", [False, True])
def test_more_scales_come_closer(patchify: bool) -> None:
    latent = 0.5 * torch.randn(4, 16, *latent_grid(GRIDS[-1], patchify), generator=torch.Generator().manual_seed(1))
    quantized = quantize(latent, GRIDS, patchify)
    assert [tuple(b.shape) for b in quantized.targets] == [(4, h * w, 64 if patchify else 16) for h, w in GRIDS]
    errors = [
        float((latent - s).square().mean())
        for s in running_sums(quantized.fed, GRIDS, patchify, latent_grid(GRIDS[-1], patchify))
    ]
    assert errors == sorted(errors, reverse=True)


def test_first_scales_are_those_of_the_whole_schedule() -> None:
    latent = torch.randn(2, 16, 8, 8)
    whole, part = quantize(latent, GRIDS), quantize(latent, GRIDS[:3])
    assert all(torch.equal(a, b) for a, b in zip(part.targets, whole.targets, strict=False))


def test_targets_mend_flipped_bits() -> None:
    latent = torch.randn(2, 16, 8, 8)
    flips = torch.tensor([0.0, 0.3])
    clean = quantize(latent, GRIDS)
    mended = quantize(latent, GRIDS, flip_probability=flips, generator=torch.Generator().manual_seed(0))
    for k in range(len(GRIDS)):
        assert torch.equal(mended.targets[k][0], clean.targets[k][0])
        assert torch.equal(mended.fed[k][0], clean.fed[k][0])
    share = torch.cat([(f ^ t)[1].flatten() for f, t in zip(mended.fed, mended.targets, strict=True)]).float().mean()
    assert 0.2 < float(share) < 0.4
    # What stays of the latent after all scales is less than if the flips had not been seen.
    unseen = [t ^ (f ^ m) for t, f, m in zip(clean.targets, mended.fed, mended.targets, strict=True)]

    def rest(bits: list[Tensor]) -> float:
        return float((latent - running_sums(bits, GRIDS, False, GRIDS[-1])[-1])[1].square().mean())

    assert rest(mended.fed) < rest(unseen)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    latent = torch.randn(3, 16, 8, 8)
    together = quantize(latent, GRIDS)
    alone = quantize(latent[1:2], GRIDS)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together.fed, alone.fed, strict=True))
    sums = running_sums(together.fed, GRIDS, False, GRIDS[-1])
    assert torch.equal(next_input(sums[2], GRIDS[3], False)[1:2], next_input(sums[2][1:2], GRIDS[3], False))
