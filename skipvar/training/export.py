"""Writes the trained model as a folder that the pipeline loads, small enough for the repository.

The folder also holds all that more training needs: the encoder, and `training.json`. Weights are the averaged ones in
half precision; the optimizers' moments are not kept: training that goes on from the folder warms up again.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from skipvar.errors import InputError
from skipvar.model.identity import write_config
from skipvar.training.backgrounds import BACKGROUNDS
from skipvar.training.common import Folders, load_checkpoint, read_history
from skipvar.training.data import NAME_PACKAGE, PICTURE_PACKAGE
from skipvar.training.objects import OBJECTS
from skipvar.training.recipe import MODEL, Recipe
from skipvar.training.text import build_tokenizer, save_text_encoder
from skipvar.training.transformer import check_encoder, load_text_to_bits
from skipvar.training.vae import Autoencoder, load_autoencoder

MAX_BYTES = 30_000_000


def export(recipe: Recipe, folders: Folders, destination: Path) -> None:
    """Writes config.json, transformer.safetensors, vae.safetensors, text_encoder/, training.json, README.md.

    Raises `InputError` where a stage is missing or does not fit the others; the destination changes only when all else
    has gone well.
    """
    check_encoder(folders)
    autoencoder, model = load_autoencoder(folders), load_text_to_bits(recipe, folders)
    record = _training_record(recipe, folders)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as temporary:
        folder = Path(temporary)
        save_file(_half(dict(autoencoder.named_parameters())), folder / "vae.safetensors")
        save_file(_half(dict(model.transformer.named_parameters())), folder / "transformer.safetensors")
        save_text_encoder(model.text_encoder, build_tokenizer(), folder / "text_encoder")
        write_config(MODEL, folder)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(recipe, record))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise ValueError(f"the model has {size} bytes, {MAX_BYTES} are allowed")
        shutil.copytree(folder, destination, dirs_exist_ok=True)


def _half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().half().contiguous() for name, weight in weights.items()}


def load_exported_autoencoder(source: Path) -> Autoencoder:
    """Encoder and decoder of an exported folder, in float32. Raises `InputError` where there is none."""
    path = source / "vae.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is not there: {source} is not a folder that `jobs.train_emoji export` wrote")
    model = Autoencoder()
    model.load_state_dict(load_file(path))
    return model.eval()


def _training_record(recipe: Recipe, folders: Folders) -> dict[str, Any]:
    """Steps, samples and last losses of both networks, and what came before this run."""
    transformer = load_checkpoint(folders.run, "transformer")
    record: dict[str, Any] = {
        "seed": recipe.seed,
        "transformer": {"step": transformer["step"], "num_samples": transformer["num_samples"]},
        "vae": {"step": load_checkpoint(folders.run, "vae")["step"]},
        "history": read_history(folders.history),
    }
    for name, kinds in (("vae", ("psnr_1", "psnr_4", "psnr_9")), ("transformer", ("coarse", "early", "full"))):
        log = folders.log(name)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for kind in kinds:
            values = [line[kind] for line in lines if kind in line]
            if values:
                record[name][kind] = values[-1]
    return record


_CARD = """---
license: mit
pipeline_tag: text-to-image
---
# emoji: a small next-scale text-to-image model

Draws {num_objects} well-known objects in the style of Microsoft's Fluent emoji, 128x128 pixels: one large, four or nine
of them, on one of {num_backgrounds} named backgrounds (eight colours; plain, striped, dotted, checked, confetti). It
exists so that `skipvar` can be run, tested and measured without a GPU; it runs through the same code as Infinity. Made
by `python -m jobs.train_emoji`.

- **Use it for** prompts such as `a large red apple on a blue background`, `four pandas on pink stripes`, `nine small
  keys on a dotted black background`. Other words are accepted and mean nothing to it.
- **Data**: npm `{pictures}` (Microsoft's Fluent emoji, MIT) for the pictures,
  npm `{names}` for the names. Nothing else; no photographs, no people.
- **Networks**: a transformer of {depth} blocks, width {width}; a convolutional autoencoder (1/8 of the side, 32 bits a
  cell, ten scales, 680 tokens); a two-layer T5 encoder over words. Weights in half precision; `vae.safetensors` also
  holds the encoder, to train on.
- **Training** (seed {seed}): autoencoder {vae_steps} steps, PSNR in training, on the first 24
  held-out compositions of one, four, nine objects:
  {psnr} dB. Transformer {steps} steps: {samples}.
  Cross-entropy per bit of each scale in training (with flipped bits and dropped text): {losses}.
- **History**: {history}
- **Measured** by `python -m jobs.train_emoji evaluate`; `samples.png` shows the first held-out prompts, by index.

Objects: {objects}.

Licence of the weights: MIT. The Fluent emoji are copyright Microsoft Corporation, MIT.
"""


def model_card(recipe: Recipe, record: dict[str, Any]) -> str:
    """The README of the exported folder."""
    transformer, vae = record["transformer"], record["vae"]
    return _CARD.format(
        num_objects=len(OBJECTS),
        num_backgrounds=len(BACKGROUNDS),
        pictures=PICTURE_PACKAGE,
        names=NAME_PACKAGE,
        depth=MODEL.transformer.depth,
        width=MODEL.transformer.width,
        seed=record["seed"],
        vae_steps=vae["step"],
        psnr=", ".join(f"{vae[key]:.1f}" for key in ("psnr_1", "psnr_4", "psnr_9")),
        steps=transformer["step"],
        samples=", ".join(
            f"{count} samples of the first {getattr(recipe.transformer, kind).num_scales} scales"
            for kind, count in transformer["num_samples"].items()
        ),
        history=" ".join(record["history"]) or "made from nothing by one run.",
        losses=" ".join(f"{x:.3f}" for x in transformer["full"]),
        objects=", ".join(names[0][0] for names in OBJECTS.values()),
    )
