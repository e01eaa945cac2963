"""Rotary position embedding of Wan: three axes (frame, row, column) share the pairs of one head.

Source: Wan 2.1 `wan/modules/model.py` (rope_params, rope_apply): theta 10000, interleaved pairs, and
22 + 21 + 21 complex numbers for a head of 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .options import PLAIN_ROPE, RopeOptions

THETA = 10000.0


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device | str = "cpu",
    options: RopeOptions = PLAIN_ROPE,
) -> torch.Tensor:
    """Rotations of every token of a (frames, rows, columns) grid.

    Angles are computed in float64, as in the original, because position times frequency needs the digits.

    Returns:
        complex64 [frames * rows * columns, head_dim // 2].
    """
    scales = (options.scale_t, options.scale_y, options.scale_x)
    shifts = (options.shift_t, options.shift_y, options.shift_x)
    positions = [
        shift + scale * torch.arange(length, dtype=torch.float64, device=device)
        for length, scale, shift in zip(grid, scales, shifts, strict=True)
    ]
    return rope_at(positions, head_dim)


def rope_at(positions: Sequence[torch.Tensor], head_dim: int) -> torch.Tensor:
    """As `rope_table`, for tokens at any positions: float64 [frames], [rows] and [columns]."""
    pairs = head_dim // 2
    spatial = pairs // 3
    axes, grid = [], [len(places) for places in positions]
    for axis, (places, share) in enumerate(zip(positions, (pairs - 2 * spatial, spatial, spatial), strict=True)):
        exponent = torch.arange(share, dtype=torch.float64, device=places.device) / share
        angles = torch.outer(places, THETA**-exponent)
        shape = [1, 1, 1, share]
        shape[axis] = len(places)
        axes.append(angles.view(shape).expand(*grid, share))
    angles = torch.cat(axes, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, n, heads, head_dim] (float32) by table [n, head_dim // 2]; float32 out."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2)
