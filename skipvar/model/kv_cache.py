"""Keys and values of the scales that have run: one preallocated block, addressed by rows and tokens."""

import torch
from torch import Tensor


class KeyValueCache:
    """Working buffer of one batch: `(depth, rows, H, tokens, c)` for keys and the same for values.

    A batch takes the first `num_rows` rows, conditional ones first. Keys are stored after norm and RoPE.
    """

    def __init__(
        self,
        *,
        depth: int,
        rows: int,
        num_heads: int,
        tokens: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (depth, rows, num_heads, tokens, head_width)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        """Tokens held; the same for every row and layer between steps."""
        self.num_rows = 0

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def begin(self, num_rows: int) -> None:
        """Forgets everything and takes the first `num_rows` rows for a new batch."""
        if num_rows > self.keys.shape[1]:
            raise ValueError(f"the cache has {self.keys.shape[1]} rows, {num_rows} were asked for")
        self.num_rows, self.length = num_rows, 0

    def keep_rows(self, num_rows: int) -> None:
        """Drops the rows after the first `num_rows`: the unconditional half."""
        self.num_rows = num_rows

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
        depth, _, num_heads, _, head_width = like.keys.shape
        shape = (depth, branches, slots, num_heads, tokens, head_width)
        self.keys = torch.empty(shape, dtype=like.keys.dtype, device=like.keys.device)
        self.values = torch.empty_like(self.keys)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def store(self, slots: Tensor, cache: KeyValueCache, images: Tensor, *, branches: int) -> None:
        """Copies the held tokens of some images of the working batch into slots.

        `slots, images: (m,)` int64 on the cache's device: image `images[i]` of the batch goes to slot `slots[i]`.
        """
        batch = cache.num_rows // branches
        for branch in range(branches):
            rows = images + branch * batch
            self.keys[:, branch, slots, :, : cache.length] = cache.keys[:, rows, :, : cache.length]
            self.values[:, branch, slots, :, : cache.length] = cache.values[:, rows, :, : cache.length]

    def load(self, slots: Tensor, cache: KeyValueCache, *, branches: int, length: int) -> None:
        """Makes the images in `slots` the working batch, with the first `length` tokens and `branches` rows each."""
        batch = len(slots)
        cache.begin(batch * branches)
        for branch in range(branches):
            rows = slice(branch * batch, (branch + 1) * batch)
            cache.keys[:, rows, :, :length] = self.keys[:, branch, slots, :, :length]
            cache.values[:, rows, :, :length] = self.values[:, branch, slots, :, :length]
        cache.length = length
