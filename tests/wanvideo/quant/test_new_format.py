"""A new format is one class: it is read, estimated, named, loaded, sharded and computed with by defining it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from testkit import tiny
from testkit.format_files import STORED, block_matrices, note, write_gguf, written
from wan_parallel.distributed.parallel.tensor import TensorShard
from wan_parallel.wanvideo.base.tensor_info import CheckpointError, TensorInfo, elements
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.weight_source import (
    open_weights,
    storage_bytes_of,
    storage_format,
    total_storage_bytes,
)
from wan_parallel.wanvideo.model import fp8_mode
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.quant.format import FORMATS, Format, Read, StoredTensor
from wan_parallel.wanvideo.quant.formats.int8 import Int8Weight
from wan_parallel.wanvideo.quant.fp8_linear import Fp8Error
from wan_parallel.wanvideo.quant.quantized import Weight, as_tensor

GIVEN = tiny.inputs()
STEPS = ".toy_steps"


def define_toy() -> type[Format]:
    """Registers a format with bytes around 128, and a step for each row in a tensor of its own."""

    @dataclass(frozen=True)
    class Toy(Format):
        companions: ClassVar[tuple[str, ...]] = (STEPS,)
        markers: ClassVar[tuple[str, ...]] = ("made_by_toy",)
        steps: TensorInfo

        @classmethod
        def recognise(cls, stored: StoredTensor) -> Format | None:
            if stored.noted_format != "toy8":
                return None
            if STEPS not in stored.companions:
                raise CheckpointError(f"{stored.file_name} has {stored.name} without its steps. Download it again.")
            return cls(stored.companions[STEPS])

        @property
        def name(self) -> str:
            return "toy 8"

        def load(self, info: TensorInfo, read: Read) -> Weight:
            return Int8Weight((read(info).int() - 128).to(torch.int8), read(self.steps).view(-1, 1))

    return Toy


@pytest.fixture
def toy() -> Iterator[type[Format]]:
    before = FORMATS[:]
    yield define_toy()
    FORMATS[:] = before


def write_toy(folder: Path) -> tuple[str, str]:
    """A file in the toy format, and one of what it stands for in float32."""
    weights = tiny.random_weights(tiny.TINY)
    stored, meant = dict(weights), dict(weights)
    for name in block_matrices(weights):
        layer, step = name.removesuffix(".weight"), weights[name].abs().amax(dim=1) / 127
        codes = (weights[name] / step[:, None]).round()
        stored[name], meant[name] = (codes + 128).to(torch.uint8), codes * step[:, None]
        stored |= {layer + STEPS: step, f"{layer}.comfy_quant": note(format="toy8")}
    stored["made_by_toy"] = torch.zeros(1)
    path = tiny.write_weights(folder / "toy.safetensors", stored)
    return path, tiny.write_weights(folder / "meant.safetensors", meant)


def test_one_class_makes_its_files_run(tmp_path, toy):
    path, meant = write_toy(tmp_path)
    header = read_header(path)
    assert header.config == tiny.TINY and header.format == "toy 8"
    assert {name: info.shape for name, info in header.tensors.items()} == tiny.TINY.shapes()
    assert storage_format(header, "bf16") == "toy 8 and bf16"
    source, reference = open_weights(path), open_weights(meant)
    for name in tiny.TINY.shapes():
        assert torch.equal(as_tensor(source.tensor(name), torch.float32), reference.tensor(name))
    model = WanModel.from_checkpoint(path)
    assert tiny.relative_error(model(*GIVEN), WanModel.from_checkpoint(meant)(*GIVEN)) <= 2e-6
    held = sum(weight.nbytes for _, weight in model.weights())
    assert 0.99 < total_storage_bytes(path, torch.float32) / held <= 1.0
    name = "blocks.0.ffn.0.weight"
    assert storage_bytes_of(path, torch.float32)[name] == elements(tiny.TINY.shapes()[name])


def test_its_weights_are_sharded_and_refused_like_the_others(tmp_path, toy):
    path, meant = write_toy(tmp_path)
    name, shard = "blocks.0.ffn.0.weight", TensorShard(2, 1)
    part = shard.take(name, open_weights(path).tensor(name))
    assert torch.equal(as_tensor(part, torch.float32), shard.take(name, open_weights(meant).tensor(name)))
    with pytest.raises(Fp8Error, match=r"has toy 8 weights, which fp8_mode linear cannot multiply"):
        fp8_mode.weights_for(read_header(path), "linear", "bf16")


def test_its_own_refusals_reach_the_user(tmp_path, toy):
    tensors = {**tiny.layout(), "blocks.0.ffn.0.comfy_quant": ("U8", (18,))}
    path = tiny.write_layout(tmp_path / "lost.safetensors", tensors)
    with open(path, "r+b") as file:
        file.seek(-18, 2)
        file.write(b'{"format": "toy8"}')
    with pytest.raises(CheckpointError, match=r"^lost\.safetensors has blocks\.0\.ffn\.0\.weight without its steps\."):
        read_header(path)


def test_without_the_class_its_files_are_refused_by_name(tmp_path):
    path, _ = write_toy(tmp_path)
    with pytest.raises(CheckpointError, match="has toy8 weights, which this version cannot read") as error:
        read_header(path)
    assert tiny.sentences(str(error.value)) == 2


@pytest.mark.parametrize("kind", [*STORED, "Q4_K"])
def test_the_order_of_the_formats_does_not_matter(tmp_path, kind, toy):
    path = write_gguf(tmp_path / "wan.gguf", kind)[0] if kind == "Q4_K" else written(tmp_path, kind)[0]
    tensors = read_header(path).tensors
    FORMATS.reverse()
    assert read_header(path).tensors == tensors
