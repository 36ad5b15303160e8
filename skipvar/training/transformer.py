"""Training of the transformer and its text encoder: predict the bits of every scale from text and earlier scales."""

import contextlib
import dataclasses
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from skipvar.errors import InputError
from skipvar.model.attention import TextPadding
from skipvar.model.bsq import next_input, quantize, running_sums
from skipvar.model.rope import rope_table
from skipvar.model.transformer import TextState, Transformer, block_causal_mask
from skipvar.training.backgrounds import BACKGROUNDS, PATTERNS
from skipvar.training.common import Folders, append_log, checkpoint_path, load_averaged, load_checkpoint
from skipvar.training.data import captions, split_combinations
from skipvar.training.muon import Optimizer
from skipvar.training.parallel import Peers
from skipvar.training.recipe import GRIDS, MODEL, SCHEDULE, Lesson, Recipe, StepKind
from skipvar.training.text import CaptionTokens, build_text_encoder, build_tokenizer, encode_captions
from skipvar.training.trainer import Trainer, train
from skipvar.training.vae import encoder_sha256, load_autoencoder

_SHORT = 256
"""Tokens below which attention is computed by plain products."""


class TextToBits(nn.Module):
    """What is trained together: the text encoder and the transformer."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(recipe.text, tokenizer, recipe.seed)
        self.transformer = Transformer(MODEL.transformer)
        self.transformer.init_weights(recipe.seed)

    def block_matrices(self) -> list[nn.Parameter]:
        """The matrices of the transformer's blocks, for Muon."""
        return [p for name, p in self.transformer.blocks.named_parameters() if name.endswith(".weight") and p.ndim == 2]


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """One training batch of `num_scales` scales."""

    ids: Tensor
    """int64 `(B, T)` padded token ids."""
    lengths: list[int]
    is_unconditional: Tensor
    """bool `(B,)`: the prompt is replaced by the learned table."""
    codes: list[Tensor]
    """Input of each scale from the second on, float32 `(B, L_k, d)`."""
    targets: Tensor
    """float32 0/1 `(B, L, d)` of all scales."""

    @property
    def num_scales(self) -> int:
        return len(self.codes) + 1


class BatchSource:
    """Draws batches from the stored latents; each is fixed by the random stream that it is drawn with."""

    def __init__(self, recipe: Recipe, folders: Folders, tokens: CaptionTokens, device: torch.device) -> None:
        self._device, self._recipe = device, recipe.transformer
        stored = load_checkpoint(folders.run, "encode")
        self._latents = stored["latents"].to(device)
        self.encoder_sha256: str = stored["encoder_sha256"]
        self._training, _ = split_combinations(recipe)
        self._chances = {lesson: self._chances_in(lesson) for lesson in recipe.transformer.lessons}
        self._tokens = tokens

    def _chances_in(self, lesson: Lesson) -> Tensor:
        """Relative frequency of each training combination."""
        by_pattern = dict(zip(PATTERNS, lesson.pattern_shares, strict=True))
        patterns = [BACKGROUNDS[combination.background_index].pattern for combination in self._training]
        by_layout = [lesson.layout_shares[combination.layout_index] for combination in self._training]
        shares = [by_pattern[pattern] * share for pattern, share in zip(patterns, by_layout, strict=True)]
        return torch.tensor(shares, device=self._device)

    def draw(self, lesson: Lesson, num_scales: int, size: int, generator: torch.Generator) -> TrainingBatch:
        """`size` combinations by the lesson's shares, each with one of its captions and bits of `num_scales` scales."""
        chosen = torch.multinomial(self._chances[lesson], size, replacement=True, generator=generator)
        shares = torch.rand(size, generator=generator, device=self._device).tolist()
        known = [captions(self._training[i]) for i in chosen.tolist()]
        ids, lengths = self._tokens.batch([one[int(u * len(one))] for one, u in zip(known, shares, strict=True)])
        flips = torch.rand(size, generator=generator, device=self._device) * self._recipe.max_flip_probability
        grids = GRIDS[:num_scales]
        bits = quantize(self._latents[chosen].float(), grids, flip_probability=flips, generator=generator)
        sums = running_sums(bits.fed, grids, False, GRIDS[-1])
        return TrainingBatch(
            ids=ids.to(self._device),
            lengths=lengths,
            is_unconditional=torch.rand(size, generator=generator, device=self._device) < self._recipe.text_dropout,
            codes=[next_input(s, grid, False) for s, grid in zip(sums, grids[1:], strict=False)],
            targets=torch.cat(bits.targets, dim=1).float(),
        )


class Objective:
    """Cross-entropy of a batch's bits, each scale weighted by the square root of its tokens."""

    def __init__(self, model: TextToBits, max_text_length: int, is_compiled: bool) -> None:
        self._model = model
        self._max_text_length = max_text_length
        self._rope = rope_table(SCHEDULE, MODEL.transformer.head_width)
        self._masks: dict[int, Tensor] = {}
        self._scale_losses = torch.compile(self._compute, dynamic=False) if is_compiled else self._compute

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """The loss (with gradient) and the cross-entropy of each scale `(num_scales,)`."""
        transformer = self._model.transformer
        features = encode_captions(self._model.text_encoder, batch.ids, batch.lengths)
        table = transformer.unconditional_text[: features.shape[1]].expand_as(features)
        features = torch.where(batch.is_unconditional[:, None, None], table, features)
        text = transformer.encode_text(features, batch.lengths, TextPadding.LONGEST)
        # One text length and always a mask: the compiled function must see one kind of batch.
        text = TextState.stack([text], TextPadding.FULL, self._max_text_length)
        num_tokens = SCHEDULE.num_tokens[: batch.num_scales]
        device = features.device
        rope = (self._rope[0][: sum(num_tokens)].to(device), self._rope[1][: sum(num_tokens)].to(device))
        if batch.num_scales not in self._masks:
            self._masks[batch.num_scales] = block_causal_mask(num_tokens, device)
        with _attention_backend(sum(num_tokens), device):
            losses = self._scale_losses(batch.codes, batch.targets, text, rope, self._masks[batch.num_scales])
        weights = torch.tensor(num_tokens, dtype=torch.float32, device=device).sqrt()
        return (losses * weights / weights.sum()).sum(), losses.detach()

    def _compute(
        self, codes: list[Tensor], targets: Tensor, text: TextState, rope: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        logits = self._model.transformer.forward_teacher_forced(codes, text, rope, mask)
        zero, one = logits.unflatten(-1, (-1, 2)).unbind(-1)
        entropy = F.binary_cross_entropy_with_logits(one - zero, targets, reduction="none").mean(dim=(0, 2))
        return torch.stack([part.mean() for part in entropy.split([1] + [c.shape[1] for c in codes])])


def _attention_backend(num_tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """On a CPU plain products are twice as fast as flash attention for short sequences, forward and backward."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH if num_tokens < _SHORT else SDPBackend.FLASH_ATTENTION)


def load_text_to_bits(recipe: Recipe, folders: Folders) -> TextToBits:
    """The trained model (EMA weights), ready for evaluation."""
    model = TextToBits(recipe, build_tokenizer())
    load_averaged(model, folders.run, "transformer")
    return model


def check_encoder(folders: Folders) -> None:
    """Raises `InputError` where latents or transformer belong to another encoder than the autoencoder's."""
    sha256 = encoder_sha256(load_autoencoder(folders).encoder)
    latents, transformer = (checkpoint_path(folders.run, stage) for stage in ("encode", "transformer"))
    if load_checkpoint(folders.run, "encode")["encoder_sha256"] != sha256:
        raise InputError(
            f"{latents} was made by another encoder than vae.pt's: `python -m jobs.train_emoji encode` makes it anew"
        )
    if transformer.exists() and load_checkpoint(folders.run, "transformer")["encoder_sha256"] != sha256:
        raise InputError(f"{transformer} has learned the bits of another encoder than vae.pt's: move one of them away")


class TransformerTrainer(Trainer):
    """Trains the transformer and its text encoder on the stored latents."""

    stage = "transformer"
    model: TextToBits

    def __init__(self, recipe: Recipe, folders: Folders, is_compiled: bool, peers: Peers) -> None:
        self.settings = recipe.transformer
        tokenizer = build_tokenizer()
        self.tokens = CaptionTokens(tokenizer)
        super().__init__(recipe, recipe.transformer, TextToBits(recipe, tokenizer), folders, peers)
        self.source = BatchSource(recipe, folders, self.tokens, peers.device)
        self.objective = Objective(self.model, self.tokens.max_length, is_compiled)
        self.num_samples = {name: 0 for lesson in recipe.transformer.lessons for name in lesson.kinds}
        self._losses: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def make_optimizer(self) -> Optimizer:
        """Of everything: Muon for the blocks' matrices, and a rate of their own for the word embeddings."""
        embeddings = self.model.text_encoder.get_input_embeddings().weight
        return Optimizer(
            self.model.parameters(),
            self.model.block_matrices(),
            self.settings.optimizer,
            self.peers.dtype,
            {embeddings: self.settings.embedding_rate},
        )

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of one batch of the kind whose turn it is."""
        name = self.settings.kind(self.step)
        kind: StepKind = getattr(self.settings, name)
        size = kind.batch_size * (self.settings.gpu_batch_factor if self.peers.device.type == "cuda" else 1)
        with self.peers.autocast():
            lesson = self.settings.lesson(self.step)
            batch = self.source.draw(lesson, kind.num_scales, size // self.peers.count, generator)
            loss, scale_losses = self.objective(batch)
        self.num_samples[name] += size
        if self.peers.is_leader:
            self._losses[name].append(scale_losses)
        return loss

    def train_step(self, factor: float) -> None:
        """One step, timed by its kind."""
        name, started = self.settings.kind(self.step), time.monotonic()
        super().train_step(factor)
        if self.peers.is_leader:
            self._seconds[name].append(time.monotonic() - started)

    def state_dict(self) -> dict[str, Any]:
        """With `num_samples` by kind, and `encoder_sha256` of the encoder whose bits were learned."""
        own = {"num_samples": self.num_samples, "encoder_sha256": self.source.encoder_sha256}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """With `num_samples`; `check_encoder` has looked at the encoder."""
        super().load_state_dict(state)
        self.num_samples |= state["num_samples"]

    def report(self) -> None:
        """Logs the mean cross-entropy of each scale since the last report, by kind of step."""
        record: dict[str, Any] = {"step": self.step, "samples": dict(self.num_samples), "time": time.time()}
        for kind, losses in self._losses.items():
            record[kind] = [round(x, 4) for x in torch.stack(losses).mean(dim=0).tolist()]
            record[f"{kind}_seconds"] = sum(self._seconds[kind]) / len(self._seconds[kind])
        append_log(self.folders.log(self.stage), record)
        self._losses.clear()
        self._seconds.clear()


def train_transformer(recipe: Recipe, folders: Folders, minutes: float, num_processes: int, is_compiled: bool) -> None:
    """Trains to the end of the recipe's schedule, or for `minutes`; goes on from the checkpoint if there is one."""
    check_encoder(folders)
    train(partial(TransformerTrainer, recipe, folders, is_compiled), minutes, num_processes)
