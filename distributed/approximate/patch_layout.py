"""How displaced patch parallelism cuts the token grid of a video: one patch for each rank, and the border strips.

Patches are boxes of the grid: bands of rows (spatial), runs of latent frames (temporal), or both (spatiotemporal).
Sizes are given in pixels, as the user sees the frame, and act in tokens; see `token_pixels`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch

from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import Grid
from ..plan.degrees import SPLIT_MODES, PatchSplit, PlanError, divisors, shares

_WAN22_CHANNELS = 48  # of the latent of Wan 2.2's own VAE (TI2V-5B), which shrinks a frame twice as much


@dataclass(frozen=True)
class Patch:
    """The tokens of one rank: frames and rows from the first to before the second, all columns."""

    frames: tuple[int, int]
    rows: tuple[int, int]

    def tokens(self, grid: Grid) -> int:
        """How many tokens of `grid` the patch has."""
        return (self.frames[1] - self.frames[0]) * (self.rows[1] - self.rows[0]) * grid.columns


@dataclass(frozen=True)
class PatchLayout:
    """The patches of a grid by rank. `border` is the width of the fresh strips in frames and rows of tokens."""

    grid: Grid
    patches: tuple[Patch, ...]
    border: tuple[int, int] = (0, 0)

    @property
    def counts(self) -> list[int]:
        """Tokens of each rank."""
        return [patch.tokens(self.grid) for patch in self.patches]

    def index(self, rank: int) -> torch.Tensor:
        """Positions of a rank's tokens in the grid, ascending; int64."""
        return self._select(self.patches[rank])

    def strip(self, owner: int, reader: int) -> Patch | None:
        """The part of the owner's patch that the reader needs fresh, counted from the patch's own corner."""
        if owner == reader or not any(self.border):
            return None
        mine, theirs = self.patches[owner], self.patches[reader]
        frames = _overlap(mine.frames, theirs.frames, self.border[0])
        rows = _overlap(mine.rows, theirs.rows, self.border[1])
        return Patch(frames, rows) if frames and rows else None

    def _select(self, patch: Patch) -> torch.Tensor:
        places = torch.arange(self.grid.tokens).view(self.grid.shape)
        return places[slice(*patch.frames), slice(*patch.rows)].flatten()

    def describe(self) -> list[str]:
        """One line for each rank: what it owns."""
        return [
            f"rank {rank}: latent frames {patch.frames[0]} to {patch.frames[1] - 1}, token rows {patch.rows[0]} to "
            f"{patch.rows[1] - 1}, {100 * count / self.grid.tokens:.1f} % of the tokens"
            for rank, (patch, count) in enumerate(zip(self.patches, self.counts, strict=True))
        ]


def _overlap(owner: tuple[int, int], reader: tuple[int, int], border: int) -> tuple[int, int] | None:
    """The part of the run `owner` that lies within the run `reader` widened by `border` on both sides.

    Counted from the start of `owner`; None where no part of it does.
    """
    start, stop = max(owner[0], reader[0] - border), min(owner[1], reader[1] + border)
    return (start - owner[0], stop - owner[0]) if start < stop else None


def token_pixels(config: WanConfig) -> int:
    """Width and height of a token in pixels: 2 x 2 latent pixels of 8 x 8 (Wan 2.1) or 16 x 16 (Wan 2.2 5B)."""
    return 32 if config.out_dim == _WAN22_CHANNELS else 16


@functools.lru_cache(maxsize=32)
def split_grid(grid: Grid, split: PatchSplit, ranks: int, pixels: int) -> PatchLayout:
    """Cut `grid` into one patch for each of `ranks`, as even as the borders' grain allows.

    Args:
        pixels: width and height of a token, see `token_pixels`.

    Raises:
        PlanError: the frame is too small for this many ranks, patch size or overlap.
    """
    if split.mode not in SPLIT_MODES:
        raise PlanError(f"split_mode is {split.mode}, which is none. Choose {', '.join(SPLIT_MODES)}.")
    if ranks == 1:
        return PatchLayout(grid, (Patch((0, grid.frames), (0, grid.rows)),))
    grain = max(1, round(split.size / pixels))
    by_time, by_rows = _degrees(grid, split, ranks, grain, pixels)
    frames, rows = _runs(grid.frames, by_time, 1), _runs(grid.rows, by_rows, grain)
    patches = tuple(Patch(f, r) for f, r in itertools.product(frames, rows))
    border = _border(split, frames, rows, pixels)
    return PatchLayout(grid, patches, border)


def _degrees(grid: Grid, split: PatchSplit, ranks: int, grain: int, pixels: int) -> tuple[int, int]:
    """Into how many parts time and rows are cut."""
    bands = math.ceil(grid.rows / grain)
    if split.mode != "temporal" and grain > grid.rows:
        raise PlanError(
            f"patch_size {split.size} is larger than the frame, which is {grid.rows * pixels} pixels high. "
            f"Set patch_size to {max(32, grid.rows * pixels // ranks // 8 * 8)} or less, or make the frame larger."
        )
    ways = [(time, ranks // time) for time in divisors(ranks)]
    if split.mode == "spatial":
        ways = [(1, ranks)]
    elif split.mode == "temporal":
        ways = [(ranks, 1)]
    possible = [way for way in ways if way[0] <= grid.frames and way[1] <= bands]
    if not possible:
        raise PlanError(_too_many(grid, split, ranks, bands))
    both = [way for way in possible if min(way) > 1]
    return min(both or possible, key=lambda way: _largest(grid, way, grain))


def _largest(grid: Grid, way: tuple[int, int], grain: int) -> int:
    frames, rows = _runs(grid.frames, way[0], 1), _runs(grid.rows, way[1], grain)
    return max(b - a for a, b in frames) * max(b - a for a, b in rows)


def _runs(length: int, parts: int, grain: int) -> list[tuple[int, int]]:
    """Cut `length` into `parts` runs whose borders are multiples of `grain`."""
    ends = [min(length, end * grain) for end in itertools.accumulate(shares(math.ceil(length / grain), parts))]
    return list(itertools.pairwise([0, *ends]))


def _border(
    split: PatchSplit, frames: list[tuple[int, int]], rows: list[tuple[int, int]], pixels: int
) -> tuple[int, int]:
    width = math.ceil(split.overlap / pixels)
    border = (width if len(frames) > 1 else 0, width if len(rows) > 1 else 0)
    for runs, wanted, unit in ((frames, border[0], "latent frames"), (rows, border[1], "rows of tokens")):
        smallest = min(stop - start for start, stop in runs)
        if wanted > smallest:
            raise PlanError(
                f"patch_overlap {split.overlap} is {wanted} {unit}, and the smallest patch has {smallest}. "
                f"Set patch_overlap to {smallest * pixels} or less, or use fewer GPUs."
            )
    return border


def _too_many(grid: Grid, split: PatchSplit, ranks: int, bands: int) -> str:
    if split.mode == "temporal":
        return (
            f"{ranks} GPUs cannot share {grid.frames} latent frames. "
            f"Set num_gpus to {grid.frames} or less, make the video longer, or use another split_mode."
        )
    what = f"the frame has {bands} bands of {split.size} pixels"
    most = bands
    if split.mode == "spatiotemporal":
        what += f" and {grid.frames} latent frames"
        fits = [n for n in range(1, ranks) if any(t <= grid.frames and n // t <= bands for t in divisors(n))]
        most = max(fits)
    return (
        f"{ranks} GPUs cannot share this video by {split.mode} patches: {what}. "
        f"Set num_gpus to {most} or less, or patch_size to a smaller value."
    )
