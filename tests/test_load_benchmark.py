"""The file that the load benchmark writes is a model."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from wan_parallel.wanvideo.model import WanModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from load import write_checkpoint


def test_the_file_is_a_whole_model_of_random_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, tiny.TINY)
    assert 0 < path.stat().st_size - 2 * tiny.TINY.parameters < 100_000
    out = WanModel.from_checkpoint(str(path))(*tiny.inputs())
    assert torch.isfinite(out).all() and out.std() > 0
