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


def _squares(weight: Tensor) -> tuple[Tensor, ...]:
    """The matrices that a weight is for Muon: a convolution is `(out, in * kernel)`, a fused query-key-value matrix
    `(m*C, C)` with `m` 2 or 3 is `m` square ones."""
    matrix = weight.flatten(1)
    rows, columns = matrix.shape
    return matrix.chunk(rows // columns if rows in (2 * columns, 3 * columns) else 1)


class Optimizer:
    """Muon (Nesterov momentum, orthogonalised) and AdamW behind one step; `factor` scales their rates."""

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
        self.parameters = list(parameters)
        self._recipe, self._dtype = recipe, dtype
        self._matrices = list(matrices)
        self._momentum = [torch.zeros_like(matrix) for matrix in self._matrices]
        chosen = {id(p) for p in (*self._matrices, *(rates or {}))}
        usual = [p for p in self.parameters if id(p) not in chosen]
        special = [{"params": [p], "lr": rate} for p, rate in (rates or {}).items()]
        self._adam = torch.optim.AdamW(
            [{"params": usual, "lr": recipe.adam_rate}, *special],
            betas=recipe.adam_betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._adam_rates = [group["lr"] for group in self._adam.param_groups]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Applies and clears the gradients, which all parameters must have."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self._recipe.gradient_clip)
        self._step_matrices(self._recipe.muon_rate * factor)
        for group, rate in zip(self._adam.param_groups, self._adam_rates, strict=True):
            group["lr"] = rate * factor
        self._adam.step()
        for parameter in self.parameters:
            parameter.grad = None

    def _step_matrices(self, rate: float) -> None:
        """Decays and updates every matrix in place; those of one shape are orthogonalised as one stack."""
        gradients = [p.grad for p in self._matrices if p.grad is not None]
        assert len(gradients) == len(self._matrices)
        torch._foreach_lerp_(self._momentum, gradients, 1 - self._recipe.muon_momentum)
        updates = torch._foreach_lerp(gradients, self._momentum, self._recipe.muon_momentum)
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, update in zip(self._matrices, updates, strict=True):
            for pair in zip(_squares(parameter.data), _squares(update), strict=True):
                by_shape[pair[0].shape].append(pair)
        for shape, pairs in by_shape.items():
            targets, pieces = (list(side) for side in zip(*pairs, strict=True))
            # 0.2 * sqrt(longer side) gives an update the size that AdamW's would have (Moonlight, arXiv 2502.16982).
            scale = rate * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(targets, 1 - rate * self._recipe.weight_decay)
            directions = orthogonalize(torch.stack(pieces), self._dtype)
            torch._foreach_add_(targets, list(directions.unbind()), alpha=-scale)

    def state_dict(self) -> dict[str, Any]:
        """`muon`, its momentum in the order of the matrices, and `adam`, the state of AdamW; no copies."""
        return {"muon": self._momentum, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave, for the same parameters in the same order."""
        for momentum, saved in zip(self._momentum, state["muon"], strict=True):
            momentum.copy_(saved)
        self._adam.load_state_dict(state["adam"])
