"""The file that the load benchmark writes is a model."""

from __future__ import annotations

import torch
from load import write_checkpoint
from testkit import tiny
from wan_parallel.wanvideo.model.model import WanModel


def test_the_file_is_a_whole_model_of_random_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, tiny.TINY)
    assert 0 < path.stat().st_size - 2 * tiny.TINY.parameters < 100_000
    out = WanModel.from_checkpoint(str(path))(*tiny.inputs())
    assert torch.isfinite(out).all() and out.std() > 0
