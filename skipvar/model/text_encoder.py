"""Text features from a T5 encoder (transformers' own), one prompt at a time and without padding."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipvar.errors import ModelError, first_line


class TextEncoder:
    """A tokenizer and a T5 encoder. Each prompt runs alone, so its features depend on nothing else."""

    def __init__(self, tokenizer: Any, encoder: Any, *, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval()
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, folder: Path, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> "TextEncoder":
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

    @classmethod
    def random(cls, *, text_width: int, max_tokens: int, seed: int, device: torch.device) -> "TextEncoder":
        """A one-layer T5 with seeded random weights over bytes: stands in where speed is measured, not pictures."""
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        config = T5Config(vocab_size=384, d_model=text_width, d_kv=64, d_ff=text_width, num_layers=1, num_heads=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder: Any = T5EncoderModel(config)
        return cls(ByT5Tokenizer(), encoder.to(device), max_tokens=max_tokens)

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """Last hidden state `(tokens, text_width)` float32, the end token kept; cut at `max_tokens`, as upstream."""
        ids = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
        return self.encoder(input_ids=ids.to(self.encoder.device)).last_hidden_state[0].float()
