"""Training of the autoencoder: L1 + L2 + gradient L1 + commitment, straight-through through the multi-scale signs."""

import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvar.model.bsq import quantize, running_sums
from skipvar.model.vae import Decoder, Encoder
from skipvar.training.common import Ema, Folders, Stretch, append_log, load_checkpoint, save_checkpoint, save_sheet
from skipvar.training.data import Combination, Pictures, split_combinations
from skipvar.training.muon import Optimizer
from skipvar.training.recipe import GRIDS, MODEL, NUM_SCALES, Recipe, VaeRecipe

logger = logging.getLogger(__name__)


class Autoencoder(nn.Module):
    """Encoder and decoder together, with the bits between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(MODEL.vae)
        self.decoder = Decoder(MODEL.vae)

    def inner_convolutions(self) -> list[nn.Parameter]:
        """The kernels of all convolutions but the first and last of each half, for Muon."""
        return [p for name, p in self.named_parameters() if p.ndim == 4 and ".conv_" not in name]

    def forward(self, images: Tensor, num_scales: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(B, 3, H, W)` decoded from the first `num_scales (B,)` scales, unclamped, and the commitment loss."""
        latent = self.encoder(images).float()
        with torch.no_grad():
            bits = quantize(latent, GRIDS).fed
            sums = torch.stack(running_sums(bits, GRIDS, False, GRIDS[-1]))
            chosen = sums[num_scales - 1, torch.arange(len(images))]
        straight_through = latent + (chosen - latent).detach()
        return self.decoder.forward_unclamped(straight_through).float(), F.mse_loss(latent, sums[-1])


def checkpoint_path(folders: Folders) -> Path:
    return folders.run / "vae.pt"


def load_autoencoder(folders: Folders) -> Autoencoder:
    """The trained autoencoder (EMA weights), ready for evaluation."""
    model = Autoencoder()
    model.load_state_dict(load_checkpoint(checkpoint_path(folders))["ema"]["weights"])
    return model.eval()


def train_vae(recipe: Recipe, folders: Folders, minutes: float, decay_minutes: float) -> None:
    """One stretch of training; goes on from the checkpoint if there is one."""
    settings = recipe.vae
    pictures = Pictures(folders.packages, recipe.image_side)
    training, held_out = split_combinations(recipe)
    torch.manual_seed(recipe.seed)
    model = Autoencoder()
    optimizer = Optimizer(model.parameters(), model.inner_convolutions(), settings.optimizer)
    ema = Ema(model, settings.ema_decay)
    step = 0
    if checkpoint_path(folders).exists():
        state = load_checkpoint(checkpoint_path(folders))
        model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step = state["step"]
        logger.info("going on from step %d", step)
    # The stream of examples depends on the seed and the step that the stretch starts at.
    generator = torch.Generator().manual_seed(recipe.seed + step)
    stretch = Stretch(minutes, decay_minutes, settings.warmup_steps)
    first_step, last_saved = step, time.monotonic()

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
        }
        save_checkpoint(checkpoint_path(folders), state)
        _report(folders, model, ema, pictures, held_out, step, last_loss=float(loss))

    while not stretch.is_over():
        loss = _step(model, pictures, training, settings, generator)
        optimizer.step(stretch.rate_factor(step - first_step))
        ema.update()
        step += 1
        if time.monotonic() - last_saved > recipe.checkpoint_seconds:
            save()
            last_saved = time.monotonic()
    save()


def _step(
    model: Autoencoder, pictures: Pictures, training: list[Combination], settings: VaeRecipe, generator: torch.Generator
) -> Tensor:
    """Gradients of one batch; returns its loss."""
    size = settings.batch_size
    chosen = torch.randint(len(training), (size,), generator=generator).tolist()
    mirrored = torch.rand(size, generator=generator) < 0.5
    images = pictures.compose([training[i] for i in chosen], mirrored)
    truncated = torch.rand(size, generator=generator) < settings.truncated_share
    dropped = torch.randint(1, 4, (size,), generator=generator) * truncated
    with torch.autocast("cpu", torch.bfloat16):
        decoded, commitment = model(images, NUM_SCALES - dropped)
    loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + settings.commitment_weight * commitment
    for axis in (-1, -2):
        loss = loss + settings.gradient_weight / 2 * F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    loss.backward()
    return loss.detach()


@torch.no_grad()
def reconstruct(model: Autoencoder, images: Tensor, num_scales: int = NUM_SCALES, batch_size: int = 16) -> Tensor:
    """Images `(B, 3, H, W)` through the first `num_scales` scales and back, clamped."""
    parts = [model(part, torch.full((len(part),), num_scales))[0].clamp(-1, 1) for part in images.split(batch_size)]
    return torch.cat(parts)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each image `(B,)`, for values in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))


def measure_psnr(model: Autoencoder, pictures: Pictures, held_out: list[Combination], layout: int, limit: int) -> float:
    """Mean PSNR over held-out combinations of one layout."""
    chosen = [c for c in held_out if c.layout_index == layout][:limit]
    images = pictures.compose(chosen, torch.zeros(len(chosen), dtype=torch.bool))
    return float(psnr(reconstruct(model, images), images).mean())


def _report(
    folders: Folders,
    model: Autoencoder,
    ema: Ema,
    pictures: Pictures,
    held_out: list[Combination],
    step: int,
    last_loss: float,
) -> None:
    """PSNR of the EMA weights on held-out combinations, and a sheet: originals above their reconstructions."""
    averaged = Autoencoder()
    averaged.load_state_dict(ema.weights)
    averaged.eval()
    with torch.autocast("cpu", torch.bfloat16):
        scores = {f"psnr_{n}": measure_psnr(averaged, pictures, held_out, i, 16) for i, n in enumerate((1, 4, 9))}
        append_log(folders.run / "vae_log.jsonl", {"step": step, "loss": last_loss, "time": time.time(), **scores})
        shown = [c for layout in range(3) for c in [h for h in held_out if h.layout_index == layout][:4]]
        images = pictures.compose(shown, torch.zeros(len(shown), dtype=torch.bool))
        rows = [images] + [reconstruct(averaged, images, n) for n in (NUM_SCALES, NUM_SCALES - 1, NUM_SCALES - 3)]
    save_sheet(folders.run / "vae_sheet.png", torch.cat(rows), columns=len(shown))
