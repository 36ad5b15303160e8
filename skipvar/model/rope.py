"""Two-dimensional rotary position embedding, stretched to one reference grid (FORWARD.md section 3)."""

import torch
from torch import Tensor

from skipvar.model.schedules import Schedule


def rope_table(schedule: Schedule, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all tokens of a schedule, scale after scale, row-major inside a scale.

    Returns two float32 tensors `(tokens of all scales, head_width / 2)`: the first half of the angles turns with the
    token's row, the second with its column.
    """
    num_frequencies = head_width // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float32) * (2 / (head_width // 2))
    frequencies = 1.0 / (10000.0**exponents)
    angles = []
    for grid in schedule.grids:
        rows, columns = stretched_positions(grid, schedule.reference_grid)
        angles.append(torch.cat([torch.outer(rows, frequencies), torch.outer(columns, frequencies)], dim=1))
    table = torch.cat(angles)
    return table.cos(), table.sin()


def stretched_positions(grid: tuple[int, int], reference: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column `(h * w,)` float32 of each token of a grid, stretched to the reference grid; halves to even."""
    rows, columns = (
        torch.round(torch.arange(size, dtype=torch.float32) * (full / size))
        for size, full in zip(grid, reference, strict=True)
    )
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each adjacent pair of channels by its angle. `x: (n, L, H, c)` float32, `cos, sin: (L, c / 2)`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
