"""Text features from a T5 encoder (transformers' own), one prompt at a time and without padding."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skipvar.errors import ModelError, first_line


class TextEncoder(Protocol):
    """From a prompt to what the transformer reads."""

    def encode(self, prompt: str) -> Tensor:
        """Features `(tokens, text_width)` float32, at least one token, on the model's device."""


class T5TextEncoder:
    """A tokenizer and a T5 encoder. Each prompt runs alone, so its features depend on nothing else."""

    def __init__(self, tokenizer: Any, encoder: Any, *, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval()
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, folder: Path, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> "T5TextEncoder":
        """From a Hugging Face folder that holds a T5 encoder (or a whole T5) and its tokenizer; never from a hub."""
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # nobody waits for this one
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no text encoder there (expected a folder with config.json, weights and tokenizer)"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            encoder: Any = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except Exception as error:  # whatever transformers makes of files that are not what it expects
            raise ModelError(f"{folder}: not a loadable T5 encoder ({first_line(error)})") from error
        return cls(tokenizer, encoder.to(device), max_tokens=max_tokens)

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """Last hidden state `(tokens, text_width)` float32, the end token kept; cut at `max_tokens`, as upstream."""
        ids = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
        return self.encoder(input_ids=ids.to(self.encoder.device)).last_hidden_state[0].float()


class RandomTextEncoder:
    """Seeded random features for each byte of a prompt and for its end: stands in where no picture is looked at.

    It takes no time, as T5 takes next to none beside the transformer; nor does transformers' import, 2 s a replica.
    """

    def __init__(self, *, text_width: int, max_tokens: int, seed: int, device: torch.device) -> None:
        self._features = torch.randn(257, text_width, generator=torch.Generator().manual_seed(seed)).to(device)
        self._max_tokens = max_tokens

    def encode(self, prompt: str) -> Tensor:
        """A row `(text_width,)` for each byte, then the end's; cut at `max_tokens`."""
        return self._features[[*prompt.encode()[: self._max_tokens - 1], 256]]
