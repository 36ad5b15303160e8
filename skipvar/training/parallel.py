"""Gradients of a batch in parts, on threads of one core each.

Threads inside an operation wait for each other at every operation: beside another busy process the slower core sets the
pace. Here a part is a whole forward and backward pass, and a free thread takes the next one.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part")


class PartedGradients(Generic[Part]):
    """`compute` maps a part to (loss with gradient, losses to report); parts of a batch are equally large."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        compute: Callable[[Part], tuple[Tensor, Tensor]],
        num_threads: int,
    ) -> None:
        self._parameters = list(parameters)
        self._compute = compute
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._is_warm: set[object] = set()

    def __call__(self, parts: Sequence[Part], kind: object) -> Tensor:
        """Sets every parameter's gradient to the mean over the parts; returns the mean reported losses.

        The first batch of a `kind` (one set of shapes) runs on one thread: compilation is not done twice.
        """
        run = self._pool.map if kind in self._is_warm else map
        self._is_warm.add(kind)
        results = list(run(self._gradients, parts))
        total = list(results[0][0])
        for gradients, _ in results[1:]:  # in the order of the parts, whichever thread was first
            torch._foreach_add_(total, list(gradients))
        torch._foreach_div_(total, len(results))
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient
        return torch.stack([losses for _, losses in results]).mean(dim=0)

    def _gradients(self, part: Part) -> tuple[tuple[Tensor, ...], Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss, losses = self._compute(part)
        return torch.autograd.grad(loss, self._parameters), losses
