"""Files with anything in them are refused in words or loaded rightly: no other error, no hang, no memory, nothing read
outside of their folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import safetensors
import torch
from hypothesis import given
from testkit import hostile, tiny
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.base.tensor_info import CheckpointError, FileHeader
from wan_parallel.wanvideo.checkpoint.file_header import read_file_header
from wan_parallel.wanvideo.checkpoint.vace_module import read_model
from wan_parallel.wanvideo.checkpoint.weight_source import Checkpoint
from wan_parallel.wanvideo.quant.quantized import as_tensor

SMALL = WanConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=32)
LAYOUT = tiny.layout(SMALL, "F32")
VARIANTS = ("TINY", "I2V_CLIP", "FUN_CAMERA", "VACE", "S2V", "HUMO", "SCAIL_2")


def written(path: Path, raw: bytes, size: int) -> Path:
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(size)
    return path


def outcome(path: Path, loads: bool = True) -> FileHeader | str:
    """The header of a file, or the sentences that refuse the file. A model that is accepted loads, unless `loads` says
    that it is too large for that."""
    try:
        header = read_file_header(str(path))
        model = read_model(str(path))
    except CheckpointError as error:
        assert 2 <= tiny.sentences(str(error)) <= 3 and len(str(error)) < 2_000, str(error)[:3_000]
        return str(error)
    if not loads:
        return header
    source = Checkpoint(str(path), stamp=model.stamp)
    for name, shape in model.config.shapes().items():
        weight = as_tensor(source.tensor(name), torch.float32)
        assert weight.numel() == torch.Size(shape).numel() and weight.sum().isfinite()
    return header


def test_mutated_safetensors_headers(tmp_path):
    accepted = 0

    @hostile.seeded(350)
    @given(hostile.safetensors_bytes(LAYOUT))
    def check(file: tuple[bytes, int]) -> None:
        nonlocal accepted
        path = written(tmp_path / "wan.safetensors", *file)
        try:
            with safetensors.safe_open(path, "np"):
                refused = False
        except (safetensors.SafetensorError, OSError):
            refused = True
        with hostile.harmless(tmp_path):
            found = outcome(path)
        if refused:
            with pytest.raises(CheckpointError):
                read_file_header(str(path))
        accepted += isinstance(found, FileHeader)

    check()
    assert accepted > 20


def test_safetensors_headers_of_models_that_are_none(tmp_path):
    """Headers that break no rule of the format, with other tensors than the variants have."""

    @hostile.seeded(150)
    @given(hostile.other_layouts(*VARIANTS))
    def check(file: tuple[bytes, int]) -> None:
        path = written(tmp_path / "wan.safetensors", *file)
        with hostile.harmless(tmp_path):
            outcome(path, loads=False)

    check()


def test_mutated_gguf_headers(tmp_path):
    accepted = 0

    @hostile.seeded(300)
    @given(hostile.gguf_files(LAYOUT))
    def check(file: tuple[bytes, int]) -> None:
        nonlocal accepted
        path = written(tmp_path / "wan.gguf", *file)
        with hostile.harmless(tmp_path):
            outcome(path)
        try:
            header = read_file_header(str(path))
        except CheckpointError:
            return
        accepted += 1
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert theirs.keys() == header.tensors.keys()
        for name, info in header.tensors.items():
            their = theirs[name]
            assert (their.data_offset, their.n_bytes) == (info.offset, info.nbytes)
            assert their.tensor_type.name == info.dtype

    check()
    assert accepted > 20


def test_mutated_folders(tmp_path):
    weights, source = tiny.random_weights(SMALL), tmp_path / "source"
    source.mkdir()
    names, shards = sorted(weights), ("diffusion_pytorch_model-00001-of-00002.safetensors", "two.safetensors")
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    places = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    for shard, half in zip(shards, halves, strict=True):
        tiny.write_weights(source / shard, {name: weights[name] for name in half})
    (source / hostile.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(source / shards[0], outside)
    accepted = number = 0

    @hostile.seeded(200)
    @given(hostile.folder_changes(outside))
    def check(change: Callable[[Path], None]) -> None:
        nonlocal accepted, number
        number += 1
        folder = tmp_path / f"models-{number}" / "transformer"
        shutil.copytree(source, folder)
        change(folder)
        with hostile.harmless(folder.parent):
            accepted += isinstance(outcome(folder), FileHeader)
        shutil.rmtree(folder.parent)

    check()
    assert accepted > 5
