"""RoPE: positions and angles are the golden ones, and a turn is a turn."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skipvar.model.rope import apply_rope, rope_table, stretched_positions
from skipvar.model.schedules import INFINITY_SCHEDULES, find_schedule

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES = load_file(GOLDEN / "rope.safetensors")


@pytest.mark.parametrize("ratio", json.loads((GOLDEN / "rope.json").read_text()))
def test_angles_are_the_golden_ones(ratio: str) -> None:
    rows = TABLES[f"rows_{ratio}"].long()
    cos, sin = rope_table(find_schedule(INFINITY_SCHEDULES, float(ratio), None), 128)
    torch.testing.assert_close(cos[rows], TABLES[f"cos_hd128_{ratio}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[rows], TABLES[f"sin_hd128_{ratio}"], atol=1e-5, rtol=0)


def test_halves_round_to_even() -> None:
    schedule = find_schedule(INFINITY_SCHEDULES, 1.25, None)
    positions = [torch.stack(stretched_positions(grid, schedule.reference_grid), dim=1) for grid in schedule.grids]
    assert torch.equal(torch.cat(positions), TABLES["positions_1.25"].float())
    rows, columns = stretched_positions((20, 16), (70, 56))
    assert rows[::16].tolist()[:4] == [0, 4, 7, 10]  # 3.5, 7, 10.5
    assert columns[:4].tolist() == [0, 4, 7, 10]


def test_shorter_sizes_use_the_start_of_the_table() -> None:
    """Positions are stretched to the full list's last grid, whatever is generated."""
    short, full = (find_schedule(INFINITY_SCHEDULES, 1.5, size) for size in ("0.25M", "1M"))
    tables = rope_table(short, 64), rope_table(full, 64)
    for a, b in zip(*tables, strict=True):
        assert len(a) == short.first_token(10) and torch.equal(a, b[: len(a)])


def test_scores_depend_on_distances_alone() -> None:
    """The product of two turned vectors is that of the same vectors elsewhere, equally far apart."""
    queries, keys = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def at(row: float, column: float) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = 10000.0 ** (-torch.arange(8) / 8)
        angles = torch.cat([row * frequencies, column * frequencies])[None]
        return angles.cos(), angles.sin()

    def score(a: tuple[float, float], b: tuple[float, float]) -> float:
        return float((apply_rope(queries, *at(*a)) * apply_rope(keys, *at(*b))).sum())

    assert math.isclose(score((3, 5), (7, 2)), score((13, 25), (17, 22)), abs_tol=1e-4)
    assert not math.isclose(score((3, 5), (7, 2)), score((3, 5), (2, 7)), abs_tol=1e-2)


def test_pairs_are_adjacent() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert apply_rope(x, cos, sin).flatten().tolist() == [0, 1, 0, 1]
