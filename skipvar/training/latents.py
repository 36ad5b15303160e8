"""All training pictures, encoded once and kept as float16 latents."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipvar.training.common import Folders, load_checkpoint, save_checkpoint
from skipvar.training.data import Pictures, split_combinations
from skipvar.training.parallel import autocast, fast_dtype, find_device
from skipvar.training.recipe import Recipe
from skipvar.training.vae import encoder_sha256, load_autoencoder

logger = logging.getLogger(__name__)


def latents_path(folders: Folders) -> Path:
    """`latents.pt` in the run's folder, which `encode_latents` writes."""
    return folders.run / "latents.pt"


@torch.no_grad()
def encode_latents(recipe: Recipe, folders: Folders, batch_size: int = 32) -> None:
    """Writes float16 latents `(training combinations, dv, h, w)`, in the order of `split_combinations`.

    Nothing to do where the file holds those of this encoder.
    """
    encoder = load_autoencoder(folders).encoder
    sha256 = encoder_sha256(encoder)
    if latents_path(folders).exists() and load_latents(folders)["encoder_sha256"] == sha256:
        return
    device = find_device()
    pictures = Pictures(folders.packages, recipe.image_side, device)
    training, _ = split_combinations(recipe)
    dtype = fast_dtype(device)
    encoder.to(device)
    parts: list[Tensor] = []
    for start in range(0, len(training), batch_size):
        chosen = training[start : start + batch_size]
        # As in the autoencoder's own training: it has learned to live with that rounding.
        with autocast(dtype, device):
            parts.append(encoder(pictures.compose(chosen)).half().cpu())
    latents = torch.cat(parts)
    logger.info("latents %s, standard deviation %.3f", tuple(latents.shape), float(latents.float().std()))
    save_checkpoint(latents_path(folders), {"latents": latents, "encoder_sha256": sha256})


def load_latents(folders: Folders) -> dict[str, Any]:
    """`latents`, and `encoder_sha256` of the encoder that made them."""
    return load_checkpoint(latents_path(folders), "encode")
