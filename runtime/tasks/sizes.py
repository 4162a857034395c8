"""The pictures' sizes: grids of 24 to 144 patches in many aspect ratios, as drawn or to be resized."""

from __future__ import annotations

from functools import cache
from random import Random

from phisight.naflex import target_size

__all__ = ["GRIDS", "MAX_PATCHES", "MIN_PATCHES", "PATCH", "Grid", "draw_size"]

PATCH = 16
MIN_PATCHES, MAX_PATCHES = 24, 144
"""The demo model's limits: a picture of a size from `draw_size` comes to just its grid."""
ODD_SHARE = 0.3
"""Pictures whose sides are no multiples of a patch, so that preprocessing resizes them."""

Grid = tuple[int, int]
"""Rows and columns of patches."""

GRIDS: tuple[Grid, ...] = tuple(
    (rows, columns)
    for rows in range(4, 25)
    for columns in range(4, 25)
    if MIN_PATCHES <= rows * columns <= MAX_PATCHES and max(rows, columns) <= 4 * min(rows, columns)
)


def draw_size(rng: Random, grid: Grid) -> tuple[int, int]:
    """Height and width in pixels of a picture that becomes `grid`: mostly its own size, at times an odd one near it."""
    height, width = grid[0] * PATCH, grid[1] * PATCH
    odd = _odd_sizes(grid)
    return rng.choice(odd) if odd and rng.random() < ODD_SHARE else (height, width)


@cache
def _odd_sizes(grid: Grid) -> tuple[tuple[int, int], ...]:
    height, width = grid[0] * PATCH, grid[1] * PATCH
    near = ((height + dy, width + dx) for dy in range(-6, 16, 3) for dx in range(-6, 16, 3) if dy or dx)
    return tuple((h, w) for h, w in near if target_size(w, h, MAX_PATCHES, MIN_PATCHES) == (width, height))
