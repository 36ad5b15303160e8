"""The optimizer: orthogonal updates, fused matrices, resuming."""

import pytest
import torch
from torch import nn

from skipvar.training.muon import Optimizer, orthogonalize
from skipvar.training.recipe import OptimizerRecipe

RECIPE = OptimizerRecipe(muon_rate=0.02, adam_rate=0.02, weight_decay=0.0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 6), (2, 6, 16)])
def test_singular_values_come_close_to_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, torch.bfloat16))
    print(f"{float(values.min()):.2f} to {float(values.max()):.2f}")
    assert values.min() > 0.3
    assert values.max() < 1.4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 4, 3, padding=1), nn.Flatten(),
                         nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 3))  # fmt: skip


def make_optimizer(model: nn.Module) -> Optimizer:
    return Optimizer(model.parameters(), [p for p in model.parameters() if p.ndim >= 2], RECIPE, torch.float32)


def train(model: nn.Module, optimizer: Optimizer, num_steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(32, 2, 4, 4, generator=generator), torch.randn(32, 3, generator=generator)
    losses = []
    for _ in range(num_steps):
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step(factor=1.0)
        losses.append(float(loss.detach()))
    return losses


def test_learns() -> None:
    model = make_model()
    losses = train(model, make_optimizer(model), 30)
    print(f"{losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < 0.1 * losses[0]


def test_goes_on_from_its_state_as_if_never_stopped() -> None:
    whole = make_model()
    train(whole, make_optimizer(whole), 6)
    first = make_model()
    optimizer = make_optimizer(first)
    train(first, optimizer, 3)
    second = make_model()
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, 3)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
