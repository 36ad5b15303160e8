"""Training of the autoencoder (L1 + L2 + gradient L1 + commitment, straight-through through the multi-scale signs), and
its latents of all training pictures."""

import hashlib
import logging
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from skipvar.model.bsq import quantize, running_sums
from skipvar.model.vae import Decoder, Encoder
from skipvar.training.backgrounds import BACKGROUNDS, PATTERNS
from skipvar.training.common import (
    Folders,
    append_log,
    checkpoint_path,
    load_averaged,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from skipvar.training.data import LAYOUT_SIDES, Combination, Pictures, split_combinations, to_pixels
from skipvar.training.muon import Optimizer
from skipvar.training.parallel import Peers, lone_process
from skipvar.training.recipe import GRIDS, MODEL, NUM_SCALES, Recipe, VaeRecipe
from skipvar.training.trainer import Trainer, train

logger = logging.getLogger(__name__)


class Autoencoder(nn.Module):
    """Encoder and decoder together, with the bits between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(MODEL.vae)
        self.decoder = Decoder(MODEL.vae)

    def forward(self, images: Tensor, num_scales: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(B, 3, H, W)` decoded from the first `num_scales (B,)` scales, unclamped, and the commitment loss."""
        latent = self.encoder(images).float()
        with torch.no_grad():
            bits = quantize(latent, GRIDS).fed
            sums = torch.stack(running_sums(bits, GRIDS, False, GRIDS[-1]))
            chosen = sums[num_scales - 1, torch.arange(len(images), device=images.device)]
        straight_through = latent + (chosen - latent).detach()
        return self.decoder.forward_unclamped(straight_through).float(), F.mse_loss(latent, sums[-1])


def load_autoencoder(folders: Folders) -> Autoencoder:
    """The trained autoencoder (EMA weights), ready for evaluation."""
    model = Autoencoder()
    load_averaged(model, folders.run, "vae")
    return model


def encoder_sha256(encoder: Encoder) -> str:
    """Of its weights: latents, and a transformer that has learned their bits, belong to one encoder."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.named_parameters()):
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


class VaeTrainer(Trainer):
    """Trains both halves, then the decoder alone."""

    stage = "vae"
    model: Autoencoder

    def __init__(self, recipe: Recipe, folders: Folders, peers: Peers) -> None:
        self.settings = recipe.vae
        self.pictures = Pictures(folders.packages, recipe.image_side, peers.device)
        self.training, self.held_out = split_combinations(recipe)
        torch.manual_seed(recipe.seed)
        super().__init__(recipe, recipe.vae, Autoencoder(), folders, peers)
        self._losses: list[Tensor] = []
        shares = torch.tensor(recipe.vae.layout_shares)
        self._chances = shares[[c.layout_index for c in self.training]].to(peers.device)

    def make_optimizer(self) -> Optimizer:
        """Of what is trained: both halves, or the decoder alone."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # Muon takes the kernels of all convolutions but the first and last of each half.
        inner = [p for name, p in trained.items() if p.ndim == 4 and ".conv_" not in name]
        return Optimizer(trained.values(), inner, self.settings.optimizer, self.peers.dtype)

    def reach_step(self, step: int) -> None:
        """Freezes the encoder in time: from then on every picture keeps its bits, those of the averaged encoder, which
        is what is exported."""
        super().reach_step(step)
        if step < self.settings.encoder_steps or not next(self.model.encoder.parameters()).requires_grad:
            return
        for name, parameter in self.model.encoder.named_parameters():
            parameter.data.copy_(self.ema.weights[f"encoder.{name}"])
            parameter.requires_grad = False
            parameter.grad = None
        self.optimizer = self.make_optimizer()
        if self.first_cold_step < self.settings.encoder_steps:  # the moments so far are those of both halves
            self.first_cold_step = step

    def _truncated_share(self, shown: Combination) -> float:
        """How often a picture is decoded without its last scales, at this step."""
        if self.step < self.settings.encoder_steps:
            return self.settings.truncated_share
        return self.settings.decoder_truncated_shares[PATTERNS.index(BACKGROUNDS[shown.background_index].pattern)]

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of a batch of pictures, some of them mirrored, some without their last scales."""
        size, device = self.settings.batch_size // self.peers.count, self.peers.device
        chosen = torch.multinomial(self._chances, size, replacement=True, generator=generator).tolist()
        images = self.pictures.compose([self.training[i] for i in chosen])
        is_mirrored = torch.rand(size, generator=generator, device=device) < 0.5
        images = torch.where(is_mirrored[:, None, None, None], images.flip(-1), images)
        shares = torch.tensor([self._truncated_share(self.training[i]) for i in chosen], device=device)
        truncated = torch.rand(size, generator=generator, device=device) < shares
        dropped = torch.randint(1, 4, (size,), generator=generator, device=device) * truncated
        with self.peers.autocast():
            decoded, commitment = self.model(images, NUM_SCALES - dropped)
        reconstruction = reconstruction_loss(decoded, images, self.settings)
        if self.peers.is_leader:
            self._losses.append(torch.stack([reconstruction.detach(), commitment.detach()]))
        return reconstruction + self.settings.commitment_weight * commitment

    @torch.no_grad()
    def report(self) -> None:
        """PSNR of the averaged weights on held-out pictures, and a sheet: originals, and ten, nine, seven scales."""
        averaged = Autoencoder().to(self.peers.device).eval()
        load_weights(averaged, self.ema.weights)
        limit = self.settings.report_pictures
        with self.peers.autocast():
            scores = {
                f"psnr_{side * side}": measure_psnr(averaged, self.pictures, self.held_out, layout, limit)
                for layout, side in enumerate(LAYOUT_SIDES)
            }
            shown = [c for layout in range(3) for c in of_layout(self.held_out, layout)[: min(4, limit)]]
            images = self.pictures.compose(shown)
            rows = [images] + [reconstruct(averaged, images, NUM_SCALES - dropped) for dropped in (0, 1, 3)]
        _save_sheet(self.folders.run / "vae_sheet.png", rows)
        loss, commitment = torch.stack(self._losses).mean(dim=0).tolist()
        self._losses.clear()
        record = {"step": self.step, "loss": loss, "commitment": commitment, "time": time.time(), **scores}
        append_log(self.folders.log(self.stage), record)


def train_vae(recipe: Recipe, folders: Folders, minutes: float, num_processes: int) -> None:
    """Trains to the end of the recipe's schedule, or for `minutes`; goes on from the checkpoint if there is one."""
    train(partial(VaeTrainer, recipe, folders), minutes, num_processes)


@torch.no_grad()
def encode_latents(recipe: Recipe, folders: Folders, batch_size: int = 32) -> None:
    """Encodes all training pictures once: float16 `latents (training combinations, dv, h, w)`, in the order of
    `split_combinations`, with the `encoder_sha256`, as the stage's checkpoint.

    Nothing to do where there are those of this encoder.
    """
    encoder = load_autoencoder(folders).encoder
    sha256 = encoder_sha256(encoder)
    is_there = checkpoint_path(folders.run, "encode").exists()
    if is_there and load_checkpoint(folders.run, "encode")["encoder_sha256"] == sha256:
        return
    process = lone_process()
    pictures = Pictures(folders.packages, recipe.image_side, process.device)
    training, _ = split_combinations(recipe)
    encoder.to(process.device)
    parts: list[Tensor] = []
    for start in range(0, len(training), batch_size):
        # As in the autoencoder's own training: it has learned to live with that rounding.
        with process.autocast():
            parts.append(encoder(pictures.compose(training[start : start + batch_size])).half().cpu())
    latents = torch.cat(parts)
    logger.info("latents %s, standard deviation %.3f", tuple(latents.shape), float(latents.float().std()))
    save_checkpoint(folders.run, "encode", {"latents": latents, "encoder_sha256": sha256})


def reconstruction_loss(decoded: Tensor, images: Tensor, settings: VaeRecipe) -> Tensor:
    """L1 + weighted L2 + weighted L1 between the finite differences along both axes."""
    loss = F.l1_loss(decoded, images) + settings.square_weight * F.mse_loss(decoded, images)
    for axis in (-1, -2):
        loss = loss + settings.gradient_weight / 2 * F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    return loss


@torch.no_grad()
def reconstruct(model: Autoencoder, images: Tensor, num_scales: int = NUM_SCALES, batch_size: int = 16) -> Tensor:
    """Images `(B, 3, H, W)` through the first `num_scales` scales and back, clamped."""
    parts = []
    for part in images.split(batch_size):
        decoded, _ = model(part, torch.full((len(part),), num_scales, device=images.device))
        parts.append(decoded.clamp(-1, 1))
    return torch.cat(parts)


def _save_sheet(path: Path, rows: list[Tensor]) -> None:
    """Rows of images, each `(B, 3, H, W)` in [-1, 1], as one PNG."""
    Image.fromarray(np.concatenate([np.concatenate(list(to_pixels(row)), axis=1) for row in rows])).save(path)


def of_layout(combinations: list[Combination], layout: int) -> list[Combination]:
    return [c for c in combinations if c.layout_index == layout]


@torch.no_grad()
def measure_psnr(model: Autoencoder, pictures: Pictures, held_out: list[Combination], layout: int, limit: int) -> float:
    """Mean PSNR in dB over the first `limit` held-out combinations of one layout."""
    images = pictures.compose(of_layout(held_out, layout)[:limit])
    square_errors = (reconstruct(model, images) - images).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / square_errors)).mean())  # 4: the square of the range, from -1 to 1
