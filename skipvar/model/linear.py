"""A linear layer whose rounding need not depend on how many rows go through it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that computes in its weight's dtype and can pad its rows (DESIGN.md, "Bits without neighbours").

    The rounding of a matrix product can change with its number of rows. With `pad_rows_to = 16` and one thread, a row's
    result is the same bits in any batch (measured on CPUs; the engine checks it at start).
    """

    pad_rows_to: int = 1

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x: (..., in_features)` of any float dtype -> `(..., out_features)` in the weight's dtype.

        `bias: (out_features,)` stands in for the layer's own.
        """
        x, bias = x.to(self.weight.dtype), self.bias if bias is None else bias
        if self.pad_rows_to == 1:
            return F.linear(x, self.weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        missing = -len(rows) % self.pad_rows_to
        if missing:
            rows = F.pad(rows, (0, 0, 0, missing))
        out = F.linear(rows, self.weight, bias)[: len(rows) - missing]
        return out.reshape(*x.shape[:-1], self.out_features)


def set_row_padding(module: nn.Module, pad_rows_to: int) -> None:
    """Sets the row padding of every `Linear` in a module; 1 turns it off."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.pad_rows_to = pad_rows_to


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter to be filled by a checkpoint or by training's initialisation."""
    return nn.Parameter(torch.zeros(*shape))
