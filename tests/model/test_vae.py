"""The decoder against golden images, and the shapes of both halves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skipvar.config import ModelSection
from skipvar.model.checkpoint import decoder_weights
from skipvar.model.config import VaeConfig
from skipvar.model.pipeline import load_pipeline
from skipvar.model.vae import Decoder, Encoder, group_norm

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = {
    "main": VaeConfig(latent_channels=16, base_width=32, width_multipliers=(1, 1, 2, 2, 2), num_res_blocks=2),
    "patchify": VaeConfig(latent_channels=14, base_width=24, width_multipliers=(1, 2, 2, 2), num_res_blocks=2),
}
SMALL = VaeConfig(latent_channels=6, base_width=8, width_multipliers=(1, 2, 3), num_res_blocks=1)


def golden_decoder(part: str) -> Decoder:
    decoder = Decoder(CONFIGS[part]).eval()
    decoder.load_state_dict(decoder_weights(decoder, GOLDEN / part / "vae.safetensors"))
    return decoder


@torch.no_grad()
def test_decodes_golden_codes_to_the_golden_image() -> None:
    run = load_file(GOLDEN / "main" / "runs" / "a_p0_cfg4_tau05.safetensors")
    image = golden_decoder("main")(run["codes"][None])[0]
    assert image.shape == (3, 256, 256)
    difference = (image[:, :64, :64] - run["decoded_rgb_crop"]).abs().max()
    pixels = ((image + 1) / 2).permute(1, 2, 0).mul(255).to(torch.uint8).flip(-1).int()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-4
    assert (pixels - run["image_bgr"].int()).abs().max() <= 1


@torch.no_grad()
def test_decodes_golden_patchified_codes_to_the_golden_image() -> None:
    # This set stores its sum thinned out, so it is summed up from the bits.
    from skipvar.model.bsq import latent_grid, running_sums
    from tests.model.test_bsq import golden_run

    tensors, grids, bits = golden_run("patchify", "a_p0")
    code_sum = running_sums(bits, grids, True, latent_grid(grids[-1], True))[-1]
    image = golden_decoder("patchify")(code_sum)[0]
    difference = (image[:, :64, :64] - tensors["decoded_rgb_crop"]).abs().max()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-4


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (32, 32), (24, 24), (48, 24), (40, 8), (16, 8)])
def test_groups(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_refuses_a_width_without_groups() -> None:
    with pytest.raises(ValueError, match="20 channels"):
        group_norm(20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_mirrors_decoder(dtype: torch.dtype) -> None:
    encoder, decoder = Encoder(SMALL).to(dtype), Decoder(SMALL).to(dtype)
    with torch.no_grad():
        latent = encoder(2 * torch.rand(2, 3, 16, 24) - 1)
        image = decoder(10 * latent)
    assert latent.shape == (2, 6, 4, 6)
    assert image.shape == (2, 3, 16, 24)
    assert image.dtype == dtype
    assert image.abs().max() <= 1


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    pipeline = load_pipeline(ModelSection(name="emoji", path="random:0", dtype="float32", device="cpu"))
    for side in (5, 16):
        latent = torch.randn(5, 32, side, side)
        whole = pipeline.decode(latent)
        for size in (1, 2, 3):
            assert torch.equal(whole[:size], pipeline.decode(latent[:size]))
