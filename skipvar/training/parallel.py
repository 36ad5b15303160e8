"""Training on one GPU where there is one, else on several processes of one core each, whose gradients are averaged.

Threads inside an operation wait for each other at every operation, and beside other busy processes the slower core then
sets the pace; threads over parts of a batch wait for the interpreter's lock, which compiled CPU kernels hold. Processes
wait once a step.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from skipvar.errors import SkipvarError
from skipvar.model.device import find_dtype

LOG_FORMAT = "%(asctime)s %(name)s %(message)s"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peers:
    """The processes of a run: equal models, different batches. Rank 0 leads: it saves, reports and keeps the clock."""

    rank: int = 0
    count: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """A context that computes in bfloat16 where that is the processes' precision; else it changes nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def generator(self, seed: int, step: int) -> torch.Generator:
        """This process's random stream for a step: the same whether or not the run was interrupted before."""
        return torch.Generator(self.device).manual_seed(seed * 1_000_003 + 10 * step + self.rank)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes every gradient the mean over the processes, the same bits in each."""
        if self.count == 1:
            return
        parent = torch.multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            raise SystemExit("the training job is gone")  # killed; its processes must not go on writing checkpoints
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.div_(self.count).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def hear_leader(self, number: float) -> float:
        """The leader's `number`, in every process."""
        if self.count == 1:
            return number
        message = torch.tensor([number])
        torch.distributed.broadcast(message, src=0)
        return float(message)


def lone_process() -> Peers:
    """This process alone, on the machine's GPU if torch can use one, in the precision that is fastest there."""
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    return Peers(dtype=_fast_dtype(device), device=device)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a processor with it that multiplies faster in it (measured); else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    if find_dtype("auto", "cpu") == "float32":
        return torch.float32  # an emulated product takes seconds: not worth a look
    matrices = [torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = {matrix.dtype: math.inf for matrix in matrices}
    for _ in range(12):  # by turns: other work on the machine hits both
        for matrix in matrices:
            start = time.perf_counter()
            matrix @ matrix
            seconds[matrix.dtype] = min(seconds[matrix.dtype], time.perf_counter() - start)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else torch.float32


def run_peers(count: int, work: Callable[[Peers], None]) -> None:
    """Runs `work` (picklable) on the GPU, or in `count` processes, and waits; one that fails ends all.

    Raises the `SkipvarError` of the process that was refused something, torch's own for any other failure.
    """
    alone = lone_process()  # one precision for all: in two their weights would drift apart
    if count == 1 or alone.device.type == "cuda":
        work(alone)
        return
    refusals = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (replace(alone, count=count), Path(folder) / "meet", work, refusals)
        try:
            torch.multiprocessing.spawn(_start, args=arguments, nprocs=count)
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException):
            if refusals.empty():
                raise
            raise refusals.get() from None


def _start(
    rank: int,
    peers: Peers,
    meeting_point: Path,
    work: Callable[[Peers], None],
    refusals: "torch.multiprocessing.SimpleQueue[SkipvarError]",
) -> None:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    torch.set_num_threads(1)
    os.nice(10)  # hours in the background: whoever works at the machine goes first
    peers = replace(peers, rank=rank)
    meeting = f"file://{meeting_point}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=peers.count)
    try:
        work(peers)
    except SkipvarError as error:
        refusals.put(error)
        raise
    torch.distributed.destroy_process_group()
