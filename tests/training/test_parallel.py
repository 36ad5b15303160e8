"""Processes that train together. They import this module, so it imports little."""

import pytest
import torch

from skipvar.training.parallel import Peers, run_peers


def _average_in_a_process(peers: Peers) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float(peers.rank))
    peers.average(parameters)
    assert peers.hear_leader(7.0 if peers.is_leader else 5.0) == 7.0
    assert all((p.grad == 0.5).all() for p in parameters)


def _fail_in_rank_one(peers: Peers) -> None:
    if peers.rank == 1:
        raise ValueError("peers of rank 1 fail")


def test_processes_average_their_gradients_and_hear_the_leader() -> None:
    run_peers(2, _average_in_a_process)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="peers of rank 1 fail"):
        run_peers(2, _fail_in_rank_one)
