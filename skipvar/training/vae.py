"""Training of the autoencoder: L1 + L2 + gradient L1 + commitment, straight-through through the multi-scale signs."""

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
from skipvar.training.common import Ema, Folders, append_log, load_checkpoint, save_checkpoint, train
from skipvar.training.data import LAYOUT_SIDES, Combination, Pictures, split_combinations
from skipvar.training.muon import Optimizer
from skipvar.training.parallel import Peers, run_peers
from skipvar.training.recipe import GRIDS, MODEL, NUM_SCALES, Recipe, VaeRecipe

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


def checkpoint_path(folders: Folders) -> Path:
    """`vae.pt` in the run's folder: weights of both halves, their average, optimizer, step."""
    return folders.run / "vae.pt"


def load_autoencoder(folders: Folders) -> Autoencoder:
    """The trained autoencoder (EMA weights), ready for evaluation."""
    model = Autoencoder()
    model.load_state_dict(load_checkpoint(checkpoint_path(folders), "vae")["ema"]["weights"])
    return model.eval()


def encoder_sha256(encoder: Encoder) -> str:
    """Of its weights: latents, and a transformer that has learned their bits, belong to one encoder."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.named_parameters()):
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


class VaeTrainer:
    """The state of a run: weights, their average, optimizer, step; and what is needed to train and report on it."""

    def __init__(self, recipe: Recipe, folders: Folders, peers: Peers) -> None:
        self.folders, self.settings, self.peers, self._seed = folders, recipe.vae, peers, recipe.seed
        self.pictures = Pictures(folders.packages, recipe.image_side, peers.device)
        self.training, self.held_out = split_combinations(recipe)
        torch.manual_seed(recipe.seed)
        self.model = Autoencoder().to(peers.device)
        self.optimizer = self._make_optimizer()
        self.ema = Ema(self.model, recipe.vae.ema_decay)
        self.step = self.first_cold_step = 0
        self._losses: list[Tensor] = []
        shares = torch.tensor(recipe.vae.layout_shares)
        self._chances = shares[[c.layout_index for c in self.training]].to(peers.device)

    def _make_optimizer(self) -> Optimizer:
        """Of what is trained: both halves, or the decoder alone."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # Muon takes the kernels of all convolutions but the first and last of each half.
        inner = [p for name, p in trained.items() if p.ndim == 4 and ".conv_" not in name]
        return Optimizer(trained.values(), inner, self.settings.optimizer, self.peers.dtype)

    def _freeze_encoder(self) -> None:
        """From here on every picture keeps its bits: those of the averaged encoder, which is what is exported."""
        for name, parameter in self.model.encoder.named_parameters():
            parameter.data.copy_(self.ema.weights[f"encoder.{name}"])
            parameter.requires_grad = False
            parameter.grad = None
        self.optimizer = self._make_optimizer()

    def _truncated_share(self, shown: Combination) -> float:
        """How often a picture is decoded without its last scales, at this step."""
        if self.step < self.settings.encoder_steps:
            return self.settings.truncated_share
        return self.settings.decoder_truncated_shares[PATTERNS.index(BACKGROUNDS[shown.background_index].pattern)]

    def train_step(self, factor: float, seconds_left: float) -> float:
        """One batch of pictures; see `common.Trainer`."""
        generator = self.peers.generator(self._seed, self.step)
        size = self.settings.batch_size // self.peers.count
        chosen = torch.multinomial(self._chances, size, replacement=True, generator=generator).tolist()
        images = self.pictures.compose([self.training[i] for i in chosen])
        is_mirrored = torch.rand(size, generator=generator, device=self.peers.device) < 0.5
        images = torch.where(is_mirrored[:, None, None, None], images.flip(-1), images)
        shares = torch.tensor([self._truncated_share(self.training[i]) for i in chosen], device=self.peers.device)
        truncated = torch.rand(size, generator=generator, device=self.peers.device) < shares
        dropped = torch.randint(1, 4, (size,), generator=generator, device=self.peers.device) * truncated
        with self.peers.autocast():
            decoded, commitment = self.model(images, NUM_SCALES - dropped)
        reconstruction = reconstruction_loss(decoded, images, self.settings)
        (reconstruction + self.settings.commitment_weight * commitment).backward()
        seconds_left = self.peers.average([p for p in self.model.parameters() if p.requires_grad], seconds_left)
        self.optimizer.step(factor)
        self.ema.update()
        self.step += 1
        if self.step == self.settings.encoder_steps:
            self._freeze_encoder()
            self.first_cold_step = self.step
        if self.peers.is_leader:
            self._losses.append(torch.stack([reconstruction.detach(), commitment.detach()]))
        return seconds_left

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "first_cold_step": self.first_cold_step,
        }
        save_checkpoint(checkpoint_path(self.folders), state)

    def restore(self) -> None:
        """See `common.Trainer`."""
        if not checkpoint_path(self.folders).exists():
            return
        state = load_checkpoint(checkpoint_path(self.folders), "vae")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.step, self.first_cold_step = state["step"], state["first_cold_step"]
        logger.info("going on from step %d", self.step)
        if self.step >= self.settings.encoder_steps:
            self._freeze_encoder()
            if self.first_cold_step < self.settings.encoder_steps:  # saved by a recipe that trained both halves so far
                self.first_cold_step = self.step
                return
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def report(self) -> None:
        """PSNR of the averaged weights on held-out pictures, and a sheet: originals, and ten, nine, seven scales."""
        averaged = Autoencoder().to(self.peers.device)
        averaged.load_state_dict(self.ema.weights)
        averaged.eval()
        limit = self.settings.report_pictures
        with self.peers.autocast():
            scores = {
                f"psnr_{side * side}": measure_psnr(averaged, self.pictures, self.held_out, layout, limit)
                for layout, side in enumerate(LAYOUT_SIDES)
            }
            shown = [c for layout in range(3) for c in of_layout(self.held_out, layout)[: min(4, limit)]]
            images = self.pictures.compose(shown)
            rows = [images] + [reconstruct(averaged, images, NUM_SCALES - dropped) for dropped in (0, 1, 3)]
        _save_sheet(self.folders.run / "vae_sheet.png", torch.cat(rows), columns=len(shown))
        loss, commitment = torch.stack(self._losses).mean(dim=0).tolist()
        self._losses.clear()
        record = {"step": self.step, "loss": loss, "commitment": commitment, "time": time.time(), **scores}
        append_log(self.folders.run / "vae_log.jsonl", record)


def train_vae(recipe: Recipe, folders: Folders, minutes: float, num_processes: int) -> None:
    """Trains to the end of the recipe's schedule, or for `minutes`; goes on from the checkpoint if there is one."""
    run_peers(num_processes, partial(_train, recipe, folders, minutes))


def _train(recipe: Recipe, folders: Folders, minutes: float, peers: Peers) -> None:
    trainer = VaeTrainer(recipe, folders, peers)
    train(trainer, recipe.vae.schedule, minutes, recipe.checkpoint_seconds, peers.is_leader)


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


def _save_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Images `(N, 3, H, W)` in [-1, 1] as one PNG, row by row."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pixels[start : start + columns]), axis=1) for start in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each image `(B,)`, for values in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))


def of_layout(combinations: list[Combination], layout: int) -> list[Combination]:
    return [c for c in combinations if c.layout_index == layout]


def measure_psnr(model: Autoencoder, pictures: Pictures, held_out: list[Combination], layout: int, limit: int) -> float:
    """Mean PSNR over the first `limit` held-out combinations of one layout."""
    chosen = of_layout(held_out, layout)[:limit]
    images = pictures.compose(chosen)
    return float(psnr(reconstruct(model, images), images).mean())
