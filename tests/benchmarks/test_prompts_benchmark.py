"""The files that the benchmark of prompts in a row writes are models, and it notices who reads one again."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

import pytest
import torch
from benchlib.prompt_files import DTYPES, ModelFiles, TextDims, expert_layout, text_layout, write_once
from prompts import Reads, prompts
from testkit import tiny
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.model.model import WanModel

CONFIG = replace(tiny.TINY, num_layers=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_is_a_whole_model(tmp_path, dtype):
    path = tmp_path / "expert.safetensors"
    write_once(path, *expert_layout(CONFIG, dtype), seed=0)
    header = read_header(str(path))
    assert header.config == CONFIG
    out = WanModel.from_checkpoint(str(path))(*tiny.inputs(CONFIG))
    assert torch.isfinite(out).all() and out.std() > 0
    written = path.stat().st_mtime_ns
    write_once(path, *expert_layout(CONFIG, dtype), seed=0)
    assert path.stat().st_mtime_ns == written  # once


def test_the_text_encoder_has_the_size_of_umt5_xxl():
    def nbytes(dtype: str) -> int:
        layout, _ = text_layout(TextDims(), dtype)
        sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
        return sum(sizes[kind] * torch.Size(shape).numel() for kind, shape in layout.values())

    assert nbytes("fp8_scaled") == pytest.approx(6.73e9, rel=0.01)
    assert nbytes("bf16") == pytest.approx(11.36e9, rel=0.01)


def test_prompts_differ():
    assert len(set(prompts(10))) == 10


@pytest.fixture
def watched(tmp_path) -> Reads:
    """Files of 8 MiB that this process may read."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("high", "low", "text", "vae")]
    for path in paths:
        path.write_bytes(b"x" * 2**23)
    reads = Reads(ModelFiles((paths[0], paths[1]), paths[2], paths[3]), os.getpid(), counts_touches=True)
    if reads.again(reads.begin()) is None:
        pytest.skip("this system does not tell what a process reads")
    return reads


def test_a_file_that_is_read_again_is_noticed(watched):
    before = watched.begin()
    watched.files.text.read_bytes()
    assert watched.again(before) >= 2**23


def test_a_mapped_file_that_is_touched_again_is_noticed(watched):
    with watched.files.vae.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert len(bytes(mapped)) == 2**23
        before = watched.begin()
        assert watched.again(before) < 2**20  # a mapping alone is no reading
        assert len(bytes(mapped)) == 2**23
        assert watched.again(before) >= 2**22
