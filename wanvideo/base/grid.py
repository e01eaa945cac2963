"""The tokens of a latent: where each token lies, how a latent becomes tokens, and how tokens become a latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .options import Options

PATCH = (1, 2, 2)  # frames, rows and columns of the latent in one token


@dataclass(frozen=True)
class Grid:
    """The tokens of a latent, frames x rows x columns, and the number of context tokens that follow in the sequence."""

    frames: int
    rows: int
    columns: int
    context_tokens: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens of the whole sequence."""
        return self.video_tokens + self.context_tokens

    @property
    def video_tokens(self) -> int:
        """The number of tokens of the latent, without context tokens."""
        return self.frames * self.rows * self.columns

    @property
    def frame_tokens(self) -> int:
        """The number of tokens of one frame."""
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latent in tokens."""
        return self.frames, self.rows, self.columns


Part = slice | torch.Tensor
"""The tokens of a grid that one rank holds: a run of neighbours (a slice), or any tokens by their indices [n]."""


def grid_of(x: torch.Tensor) -> Grid:
    """The token grid of a latent [B, C, T, H, W]; odd heights and widths round up (see `pad_to_patch`)."""
    sizes = (math.ceil(size / patch) for size, patch in zip(x.shape[-3:], PATCH, strict=True))
    return Grid(*sizes)


def sequence_of(x: torch.Tensor, options: Options) -> Grid:
    """The grid of a latent [B, C, T, H, W] with the context tokens that `options` describe."""
    return replace(grid_of(x), context_tokens=options.context_tokens)


def video_part(grid: Grid, part: Part) -> Part:
    """The tokens of `part` that belong to the video. A `part` of indices holds tokens of the video alone."""
    if isinstance(part, slice):
        return slice(min(part.start, grid.video_tokens), min(part.stop, grid.video_tokens))
    return part


def frames_of(grid: Grid, part: Part) -> tuple[slice, Part]:
    """The frames in which the tokens `part` lie, at least one frame, and the indices of these tokens in the frames."""
    if isinstance(part, slice):
        first = min(part.start // grid.frame_tokens, grid.frames - 1)
        stop = max(first + 1, math.ceil(part.stop / grid.frame_tokens))
        offset = first * grid.frame_tokens
        return slice(first, stop), slice(part.start - offset, part.stop - offset)
    first = int(part.min()) // grid.frame_tokens
    return slice(first, int(part.max()) // grid.frame_tokens + 1), part - first * grid.frame_tokens


def pad_to_patch(x: torch.Tensor) -> torch.Tensor:
    """Extend an odd height or width by wrapping round, as ComfyUI does; the result is cropped again."""
    rows, columns = x.shape[-2] % PATCH[1], x.shape[-1] % PATCH[2]
    if rows:
        x = torch.cat([x, x[..., :1, :]], dim=-2)
    if columns:
        x = torch.cat([x, x[..., :1]], dim=-1)
    return x


def patchify(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] with even H and W to tokens [B, T*H/2*W/2, C*4], frame by frame, row by row."""
    b, c, t, h, w = x.shape
    x = x.view(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(b, t * (h // 2) * (w // 2), c * 4)


def unpatchify(tokens: torch.Tensor, grid: Grid, size: Sequence[int]) -> torch.Tensor:
    """Tokens [B, grid.tokens, 4*C] of the head back to a latent [B, C, T, H, W], cropped to the `size` (T, H, W)."""
    b, c = tokens.shape[0], tokens.shape[-1] // 4
    x = tokens.view(b, *grid.shape, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5)
    x = x.reshape(b, c, grid.frames, grid.rows * 2, grid.columns * 2)
    return x[..., : size[0], : size[1], : size[2]]
