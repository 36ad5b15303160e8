"""Muon for matrices and convolutions inside the networks (momentum, then orthogonalised), AdamW for everything else."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipvar.training.recipe import OptimizerRecipe

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic iteration (K. Jordan, 2024): singular values end near one, fast rather than exact."""


def orthogonalize(matrices: Tensor, dtype: torch.dtype, num_steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of a stack `(N, rows, columns)`; computed in `dtype`."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon:
    """Nesterov momentum whose update is orthogonalised; matrices of one shape go through it as one stack.

    A convolution counts as the matrix `(out, in * kernel)`. A fused query-key-value matrix `(m*C, C)` with `m` 2 or 3
    is treated as `m` square ones.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float, weight_decay: float, dtype: torch.dtype) -> None:
        self.matrices = matrices
        self._dtype = dtype
        self._momentum = momentum
        self._weight_decay = weight_decay
        self.buffers = [torch.zeros_like(p) for p in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Decays and updates every matrix in place at learning rate `rate`; all must have gradients."""
        gradients = [p.grad for p in self.matrices if p.grad is not None]
        assert len(gradients) == len(self.matrices)
        torch._foreach_lerp_(self.buffers, gradients, 1 - self._momentum)
        updates = torch._foreach_lerp(gradients, self.buffers, self._momentum)
        stacks: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        targets: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter, update in zip(self.matrices, updates, strict=True):
            rows, columns = update.flatten(1).shape
            parts = rows // columns if rows in (2 * columns, 3 * columns) else 1
            halves = (x.flatten(1).chunk(parts) for x in (update, parameter.data))
            for piece, target in zip(*halves, strict=True):
                shape = (piece.shape[0], piece.shape[1])
                stacks[shape].append(piece)
                targets[shape].append(target)
        for shape, pieces in stacks.items():
            # 0.2 * sqrt(longer side) gives an update the size that AdamW's would have (Moonlight, arXiv 2502.16982).
            scale = rate * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(targets[shape], 1 - rate * self._weight_decay)
            torch._foreach_add_(
                targets[shape], list(orthogonalize(torch.stack(pieces), self._dtype).unbind()), alpha=-scale
            )


class Optimizer:
    """Both optimizers behind one step; `factor` scales their rates."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        matrices: Iterable[nn.Parameter],
        recipe: OptimizerRecipe,
        dtype: torch.dtype,
        rates: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        """`matrices` are those of `parameters` that Muon takes, computing in `dtype`; `rates` are AdamW rates other
        than the recipe's."""
        self._recipe = recipe
        self._parameters = list(parameters)
        self._muon = Muon(list(matrices), recipe.muon_momentum, recipe.weight_decay, dtype)
        chosen = {id(p) for p in self._muon.matrices} | {id(p) for p in rates or {}}
        usual = [p for p in self._parameters if id(p) not in chosen]
        special = [{"params": [p], "lr": rate} for p, rate in (rates or {}).items()]
        self._adam = torch.optim.AdamW(
            [{"params": usual, "lr": recipe.adam_rate}, *special],
            betas=recipe.adam_betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._adam_rates = [group["lr"] for group in self._adam.param_groups]

    def step(self, factor: float) -> None:
        """Applies and clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.gradient_clip)
        self._muon.step(self._recipe.muon_rate * factor)
        for group, rate in zip(self._adam.param_groups, self._adam_rates, strict=True):
            group["lr"] = rate * factor
        self._adam.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """`muon`, its momentum in the order of the matrices, and `adam`, the state of AdamW; no copies."""
        return {"muon": self._muon.buffers, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave, for the same parameters in the same order."""
        for buffer, saved in zip(self._muon.buffers, state["muon"], strict=True):
            buffer.copy_(saved)
        self._adam.load_state_dict(state["adam"])
