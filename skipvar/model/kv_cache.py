"""Keys and values of the scales that have run: one preallocated block, addressed by rows and tokens."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Working buffer of one batch: keys `(depth, rows, H, tokens, c)` and values of the same shape.

    The memory is allocated once, for `capacity` tokens over all rows; each batch cuts it into as many rows as it has
    images and branches, conditional rows first. Keys are stored after norm and RoPE.
    """

    def __init__(
        self, *, depth: int, num_heads: int, head_width: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.depth, self.num_heads, self.head_width, self.capacity = depth, num_heads, head_width, capacity
        self._storage = torch.empty(2, depth * capacity * num_heads * head_width, dtype=dtype, device=device)
        self.num_rows = 0
        self.length = 0
        """Tokens held; the same for every row and layer between steps."""

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.dtype

    @property
    def device(self) -> torch.device:
        return self._storage.device

    def begin(self, num_rows: int, num_tokens: int) -> None:
        """Forgets everything and makes room for a new batch of `num_rows` rows of up to `num_tokens` tokens."""
        if num_rows * num_tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {num_rows} rows of {num_tokens} were asked for")
        shape = (self.depth, num_rows, self.num_heads, num_tokens, self.head_width)
        self.keys, self.values = (part[: math.prod(shape)].view(shape) for part in self._storage)
        self.num_rows, self.length = num_rows, 0

    def keep_rows(self, num_rows: int) -> None:
        """Drops the rows after the first `num_rows`: the unconditional half."""
        self.num_rows = num_rows

    def rewind(self, length: int) -> None:
        """Forgets the tokens after the first `length`; dropped rows stay dropped."""
        self.length = length

    def extend(self, layer: int, keys: Tensor, values: Tensor, *, write: bool) -> tuple[Tensor, Tensor]:
        """All keys and values that a scale's queries see: those held, then the new ones `(rows, H, L, c)`.

        With `write` they stay in the cache (`advance` once all layers have done so); without, as for the last scale
        that runs, the cache needs no room for them.
        """
        held = slice(0, self.length)
        rows = slice(0, self.num_rows)
        if not write:
            return (
                torch.cat([self.keys[layer, rows, :, held], keys], dim=2),
                torch.cat([self.values[layer, rows, :, held], values], dim=2),
            )
        end = self.length + keys.shape[2]
        self.keys[layer, rows, :, self.length : end] = keys
        self.values[layer, rows, :, self.length : end] = values
        return self.keys[layer, rows, :, :end], self.values[layer, rows, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts a scale's tokens as held."""
        self.length += num_tokens


class SlotStore:
    """Keys and values of images that wait in buckets: `(depth, branches, slots, H, tokens, c)`.

    Branch 0 is the conditional row of an image, branch 1 the unconditional one.
    """

    def __init__(self, *, like: KeyValueCache, slots: int, branches: int, tokens: int) -> None:
        shape = (like.depth, branches, slots, like.num_heads, tokens, like.head_width)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    def store(self, slots: Sequence[int], cache: KeyValueCache, images: Sequence[int], *, branches: int) -> None:
        """Copies the held tokens of some images of the working batch into slots: `images[i]` into `slots[i]`.

        One image at a time, so that no gathered copy of the batch takes memory in between.
        """
        batch, length = cache.num_rows // branches, cache.length
        for slot, image in zip(slots, images, strict=True):
            for branch in range(branches):
                row = image + branch * batch
                self.keys[:, branch, slot, :, :length] = cache.keys[:, row, :, :length]
                self.values[:, branch, slot, :, :length] = cache.values[:, row, :, :length]

    def load(self, slots: Sequence[int], cache: KeyValueCache, *, branches: int, length: int, num_tokens: int) -> None:
        """Makes the images in `slots` the working batch, with `length` tokens each and room for `num_tokens`."""
        batch = len(slots)
        cache.begin(batch * branches, num_tokens)
        for image, slot in enumerate(slots):
            for branch in range(branches):
                row = image + branch * batch
                cache.keys[:, row, :, :length] = self.keys[:, branch, slot, :, :length]
                cache.values[:, row, :, :length] = self.values[:, branch, slot, :, :length]
        cache.length = length
