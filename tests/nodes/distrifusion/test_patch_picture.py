"""The picture of how a video is cut into patches."""

from __future__ import annotations

import pytest
import torch
from wan_parallel.distributed.approximate.patch_layout import split_grid
from wan_parallel.distributed.plan.degrees import PatchSplit
from wan_parallel.nodes.distrifusion.patch_picture import draw_layout
from wan_parallel.wanvideo.base.grid import Grid


@pytest.mark.parametrize("mode", ["spatial", "temporal", "spatiotemporal"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_picture_of_a_layout(mode, ranks):
    layout = split_grid(Grid(21, 30, 52), PatchSplit(mode, 32, 16), ranks, 16)
    picture = draw_layout(layout, "a layout", torch.rand(48, 83, 3))
    assert picture.shape[0] == 1 and picture.shape[2:] == (992, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1
    grey = draw_layout(layout, "a layout")
    colours = {tuple(colour) for colour in (grey[0, ::2, 30::9] * 255).int().flatten(0, 1).tolist()}
    assert len(colours) > ranks


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
def test_a_frame_of_any_size_has_a_picture(size):
    layout = split_grid(Grid(2, 4, 4), PatchSplit("spatial", 32, 0), 2, 16)
    assert draw_layout(layout, "a layout", torch.rand(*size, 3)).shape[2:] == (992, 3)
