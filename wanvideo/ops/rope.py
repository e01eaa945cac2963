"""Rotary position embedding of Wan: three axes (frame, row, column) share the pairs of one head.

Source: Wan 2.1 `wan/modules/model.py` (rope_params, rope_apply): theta 10000, interleaved pairs, and
22 + 21 + 21 complex numbers for a head of 128.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..base.options import PLAIN, PLAIN_ROPE, ContextGrid, Options, RopeOptions

THETA = 10000.0
FULL_RATE = 30.0  # frames a second that WanDancer counts in


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device | str = "cpu",
    options: RopeOptions = PLAIN_ROPE,
    fps: float = 0.0,
) -> torch.Tensor:
    """Rotations of every token of a (frames, rows, columns) grid.

    With `fps` (WanDancer), a frame's position is its number in a video of 30 frames a second, and the last frame stands
    at the end of this video; `options` then only shift the frames.

    Angles are computed in float64, as in the original, because position times frequency needs the digits.

    Returns:
        complex64 [frames * rows * columns, head_dim // 2].
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    scales = (options.scale_t, options.scale_y, options.scale_x)
    shifts = (options.shift_t, options.shift_y, options.shift_x)
    axes = []
    for axis, (length, share) in enumerate(zip(grid, (pairs - 2 * spatial, spatial, spatial), strict=True)):
        exponent = torch.arange(share, dtype=torch.float64, device=device) / share
        positions = scales[axis] * torch.arange(length, dtype=torch.float64, device=device)
        if fps and axis == 0:
            positions = torch.arange(length, dtype=torch.float64, device=device) * (FULL_RATE / fps)
            positions[-1] = int(FULL_RATE / fps * length + 0.5) - 1
        positions += shifts[axis]
        angles = torch.outer(positions, THETA**-exponent)
        shape = [1, 1, 1, share]
        shape[axis] = length
        axes.append(angles.view(shape).expand(*grid, share))
    angles = torch.cat(axes, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def sequence_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu", options: Options = PLAIN
) -> torch.Tensor:
    """Rotations of a whole sequence: of the reference frames, of the video, and of the context tokens.

    Args:
        grid: (frames, rows, columns) of the reference frames and the video together.

    Returns:
        complex64 [frames * rows * columns + options.context_tokens, head_dim // 2].
    """
    frames, rows, columns = grid
    reference_rope = options.reference_rope
    front = 0 if reference_rope is None else options.reference_frames
    tables = [rope_table((frames - front, rows, columns), head_dim, device, options.rope, options.fps)]
    if front and reference_rope is not None:
        tables.insert(0, rope_table((front, rows, columns), head_dim, device, reference_rope))
    tables += [_context_table(context, grid, head_dim, device) for context in options.context_grids]
    return torch.cat(tables) if len(tables) > 1 else tables[0]


def _context_table(
    context: ContextGrid, grid: tuple[int, int, int], head_dim: int, device: torch.device | str
) -> torch.Tensor:
    """Rotations of the tokens of one context grid. The phases are Bernini's, the stretched grids are those of SCAIL's
    pose, both as ComfyUI runs these models."""
    rope = context.rope
    if context.stretched:
        y, x = grid[1] / context.rows, grid[2] / context.columns
        shift_y, shift_x = rope.shift_y + (y - 1) / 2, rope.shift_x + (x - 1) / 2
        rope = replace(rope, scale_y=y, scale_x=x, shift_y=shift_y, shift_x=shift_x)
    table = rope_table(context.shape, head_dim, device, rope)
    if not context.rope_phase:
        return table
    pairs = head_dim // 2
    angles = context.rope_phase * THETA ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    return (table * torch.polar(torch.ones_like(angles), angles)).to(torch.complex64)


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, n, heads, head_dim] (float32) by table [n, head_dim // 2]; float32 out."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2)
