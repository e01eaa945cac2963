"""How the token grid is cut into patches: every token once, borders on the grain, strips as wide as asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.approximate.patch_layout import Patch, PatchLayout, split_grid, token_pixels
from wan_parallel.distributed.plan.degrees import SPLIT_MODES, PatchSplit, PlanError
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import Grid

GRIDS = [Grid(21, 30, 52), Grid(21, 45, 80), Grid(9, 17, 3), Grid(8, 16, 1), Grid(13, 23, 5)]
PIXELS = 16


def cut(grid: Grid, mode: str, ranks: int, size: int = 32, overlap: int = 0, pixels: int = PIXELS) -> PatchLayout:
    return split_grid(grid, PatchSplit(mode, size, overlap), ranks, pixels)


def refusal(grid: Grid, mode: str, ranks: int, size: int = 32, overlap: int = 0) -> str:
    with pytest.raises(PlanError) as error:
        cut(grid, mode, ranks, size, overlap)
    text = str(error.value)
    assert tiny.sentences(text) == 2, text
    return text


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mode", SPLIT_MODES)
def test_every_token_belongs_to_exactly_one_patch(grid, mode):
    for ranks in range(1, 9):
        layout = cut(grid, mode, ranks)
        places = [layout.index(rank) for rank in range(ranks)]
        assert torch.equal(torch.cat(places).sort().values, torch.arange(grid.tokens)), ranks
        assert [len(p) for p in places] == layout.counts and min(layout.counts) > 0
        assert all(torch.equal(p, p.sort().values) for p in places)
        assert len(layout.describe()) == ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_borders_between_rows_lie_on_the_grain(ranks):
    for size, mode in itertools.product(range(32, 136, 8), ("spatial", "spatiotemporal")):
        grid, grain = GRIDS[1], round(size / PIXELS)
        for patch in cut(grid, mode, ranks, size).patches:
            assert patch.rows[0] % grain == 0, (size, mode)
            assert patch.rows[1] % grain == 0 or patch.rows[1] == grid.rows, (size, mode)


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("ranks", range(2, 9))
def test_patches_differ_by_one_grain_at_most(size, ranks):
    grid, grain = Grid(21, 48, 4), size // PIXELS
    heights = [b - a for a, b in (patch.rows for patch in cut(grid, "spatial", ranks, size).patches)]
    lengths = [b - a for a, b in (patch.frames for patch in cut(grid, "temporal", ranks, size).patches)]
    assert max(heights) - min(heights) <= grain
    assert max(lengths) - min(lengths) <= 1


def test_the_modes_cut_what_they_say():
    grid = GRIDS[0]
    for ranks in (2, 4, 6, 8):
        assert {patch.frames for patch in cut(grid, "spatial", ranks).patches} == {(0, grid.frames)}
        assert {patch.rows for patch in cut(grid, "temporal", ranks).patches} == {(0, grid.rows)}
    for ranks in (4, 6, 8):
        both = cut(grid, "spatiotemporal", ranks).patches
        assert len({patch.frames for patch in both}) > 1 and len({patch.rows for patch in both}) > 1
    for mode in SPLIT_MODES:
        assert cut(grid, mode, 1).counts == [grid.tokens]


def test_a_prime_number_of_ranks_cuts_rows_or_frames():
    assert len(cut(GRIDS[0], "spatiotemporal", 7).patches) == 7


@pytest.mark.parametrize("size, pixels", [("1.3b", 16), ("14b", 16), ("5b", 32)])
def test_a_token_has_the_pixels_of_its_vae(size, pixels):
    assert token_pixels(PRESETS[size]) == pixels


# Strips.


@pytest.mark.parametrize("overlap, width", [(0, 0), (1, 1), (8, 1), (16, 1), (17, 2), (24, 2), (32, 2)])
def test_an_overlap_in_pixels_is_rounded_up_to_whole_tokens(overlap, width):
    grid = Grid(8, 16, 3)
    assert cut(grid, "spatial", 4, overlap=overlap).border == (0, width)
    assert cut(grid, "temporal", 4, overlap=overlap).border == (width, 0)
    assert cut(grid, "spatiotemporal", 4, overlap=overlap).border == (width, width)
    assert cut(grid, "spatial", 1, overlap=overlap).border == (0, 0)


def places(layout: PatchLayout, owner: int, strip: Patch | None) -> torch.Tensor:
    """The tokens of a strip as places in its owner's patch."""
    if strip is None:
        return torch.empty(0, dtype=torch.int64)
    patch = layout.patches[owner]
    shape = patch.frames[1] - patch.frames[0], patch.rows[1] - patch.rows[0], layout.grid.columns
    return torch.arange(shape[0] * shape[1] * shape[2]).view(shape)[slice(*strip.frames), slice(*strip.rows)].flatten()


@pytest.mark.parametrize("mode", SPLIT_MODES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_strips_are_the_tokens_within_the_overlap(mode, ranks, overlap):
    grid = Grid(12, 23, 2)
    layout = cut(grid, mode, ranks, overlap=overlap)
    frame, row = (
        torch.arange(grid.tokens).view(grid.shape).flatten() // (grid.rows * grid.columns),
        torch.arange(grid.tokens) // grid.columns % grid.rows,
    )
    width = overlap // PIXELS
    cuts_time, cuts_rows = (len({getattr(patch, axis) for patch in layout.patches}) > 1 for axis in ("frames", "rows"))
    for owner, reader in itertools.product(range(ranks), repeat=2):
        mine, its = layout.index(owner), layout.index(reader)
        far_in_time = (frame[mine, None] - frame[None, its]).abs() > (width if cuts_time else 0)
        far_in_rows = (row[mine, None] - row[None, its]).abs() > (width if cuts_rows else 0)
        near = (~(far_in_time | far_in_rows)).any(1)
        expected = near.nonzero().flatten() if owner != reader and width else torch.empty(0, dtype=torch.int64)
        assert torch.equal(places(layout, owner, layout.strip(owner, reader)), expected)


# Refusals.


def test_a_mode_that_is_none_is_refused():
    assert "spatial, temporal, spatiotemporal" in refusal(GRIDS[0], "diagonal", 2)


def test_a_patch_size_over_the_frame_is_refused_with_one_that_works():
    grid = Grid(5, 6, 8)
    text = refusal(grid, "spatial", 2, size=128)
    assert "patch_size 128 is larger than the frame, which is 96 pixels high" in text
    assert "Set patch_size to 48 or less" in text
    cut(grid, "spatial", 2, size=48)
    refusal(grid, "spatiotemporal", 2, size=128)
    cut(grid, "temporal", 2, size=128)  # time has no pixels


@pytest.mark.parametrize(
    "mode, grid, ranks, most",
    [
        ("spatial", Grid(5, 8, 8), 8, 4),
        ("spatial", Grid(5, 7, 8), 5, 4),
        ("temporal", Grid(5, 8, 8), 8, 5),
        ("temporal", Grid(1, 8, 8), 2, 1),
        ("spatiotemporal", Grid(3, 4, 8), 8, 6),
        ("spatiotemporal", Grid(1, 4, 8), 3, 2),
    ],
    ids=str,
)
def test_too_many_ranks_are_refused_with_the_most_that_work(mode, grid, ranks, most):
    assert f"Set num_gpus to {most} or less" in refusal(grid, mode, ranks)
    cut(grid, mode, most)
    for more in range(most + 1, ranks + 1):
        refusal(grid, mode, more)


@pytest.mark.parametrize("mode, grid", [("spatial", Grid(5, 7, 8)), ("temporal", Grid(5, 8, 8))], ids=str)
def test_an_overlap_over_the_patch_is_refused_with_the_widest_that_works(mode, grid):
    text = refusal(grid, mode, 4, overlap=32)
    assert "patch_overlap 32 is 2 " in text and "Set patch_overlap to 16 or less" in text
    cut(grid, mode, 4, overlap=16)
