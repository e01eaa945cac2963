"""Matrices in the block formats of GGUF, dequantised on whatever device they are.

A row is a sequence of blocks of 32 or 256 numbers, each with a scale or several. The formats are those of ggml's
`ggml-common.h` (`block_q4_K` and so on). The arithmetic is float32 in the order of ggml's reference functions, so that
the results equal ggml's bit for bit. Triton, where it can be used (see `pointwise.use_triton`), reads and writes a
matrix once; torch takes a dozen passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import torch

from ...base.tensor_info import TensorInfo, elements
from ...ops.pointwise import triton_in_use
from ..format import Format, Read, StoredTensor
from ..quantized import QuantizedWeight, Weight, covering
from .int8 import Int8Weight

_CHUNK = 1 << 25
"""Numbers dequantised at once: intermediate results take several times the room of a float32 matrix."""


@dataclass(frozen=True)
class BlockFormat:
    """The layout of one block of `numbers` numbers in `nbytes` bytes. `dequantize` converts n blocks, given as uint8
    [n, nbytes], to float32 [n, numbers]."""

    numbers: int
    nbytes: int
    dequantize: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class GgufWeight(QuantizedWeight):
    """Rows of whole blocks, uint8 [rows, bytes]. A slice of columns keeps the blocks that it touches: `skip` columns
    before it, and `columns` of its own."""

    dtype: str
    blocks: torch.Tensor
    columns: int
    skip: int = 0

    @property
    def shape(self) -> torch.Size:
        """The logical shape, [rows, columns]."""
        return torch.Size((len(self.blocks), self.columns))

    @property
    def format(self) -> str:
        """The type of the blocks behind "GGUF"."""
        return _name(self.dtype)

    def components(self) -> dict[str, torch.Tensor]:
        """`blocks`."""
        return {"blocks": self.blocks}

    def replace(self, components: Mapping[str, torch.Tensor]) -> GgufWeight:
        """The weight with other `blocks`."""
        return replace(self, blocks=components["blocks"])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, by a Triton kernel on a GPU where Triton works; its results are the same."""
        if not (self.blocks.is_cuda and triton_in_use()):
            return self.dequantize_by_torch(dtype)
        return import_module("..gguf_triton", __package__).dequantize(self, dtype)

    def dequantize_by_torch(self, dtype: torch.dtype) -> torch.Tensor:
        """`dequantize` in plain torch, which runs on any device."""
        block = BLOCKS[self.dtype]
        out = torch.empty(self.shape, dtype=dtype, device=self.blocks.device)
        step = max(1, _CHUNK // max(1, self.columns))
        for start in range(0, len(out), step):
            rows = self.blocks[start : start + step]
            numbers = block.dequantize(rows.reshape(-1, block.nbytes)).view(len(rows), -1)
            out[start : start + step] = numbers[:, self.skip : self.skip + self.columns]
        return out

    def narrow(self, dim: int, start: int, length: int) -> GgufWeight:
        """Some rows, or some columns with all blocks that these touch."""
        if dim == 0:
            return replace(self, blocks=self.blocks.narrow(0, start, length))
        block = BLOCKS[self.dtype]
        first, last = covering(self.skip + start, length, block.numbers)
        blocks = self.blocks.narrow(1, first * block.nbytes, (last - first) * block.nbytes)
        return GgufWeight(self.dtype, blocks, length, self.skip + start - first * block.numbers)

    def requantize(self, weight: torch.Tensor) -> QuantizedWeight:
        """`weight` in 8 bits (see `to_eight_bits`), whatever the type of the blocks."""
        return to_eight_bits(weight)


def to_eight_bits(weight: torch.Tensor) -> QuantizedWeight:
    """A float matrix in Q8_0, whose error (0.5 %) is far below that of smaller formats, or in 8 bits and a scale for
    each channel where a row is no multiple of its blocks."""
    if weight.shape[1] % BLOCKS["Q8_0"].numbers:
        return Int8Weight.quantize(weight)
    return GgufWeight("Q8_0", _quantize_q8_0(weight), weight.shape[1])


def _float16(block_bytes: torch.Tensor) -> torch.Tensor:
    """Bytes [n, 2k] that hold float16 numbers, as float32 [n, k]."""
    return block_bytes.contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor, group: int) -> torch.Tensor:
    """[n, bytes] to [n, 2 * bytes]: the low halves of `group` bytes, then their high halves, group by group."""
    return _shifted(packed, group, (0, 4), 15)


def _shifted(packed: torch.Tensor, group: int, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """Bits of [n, bytes]: for each `group` of bytes, every byte's bits at the first shift, then at the second, ..."""
    parts = packed.unflatten(1, (-1, 1, group))
    amounts = torch.tensor(shifts, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    return ((parts >> amounts) & mask).flatten(1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """[n, bytes] to [n, 8 * bytes], the lowest bit of each byte first."""
    return _shifted(packed, 1, tuple(range(8)), 1)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _float16(b[:, :2]) * (_nibbles(b[:, 2:], 16).float() - 8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _float16(b[:, :2]) * _nibbles(b[:, 4:], 16).float() + _float16(b[:, 2:4])


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    number = _nibbles(b[:, 6:], 16) | (_bits(b[:, 2:6]) << 4)
    return _float16(b[:, :2]) * (number.float() - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    number = _nibbles(b[:, 8:], 16) | (_bits(b[:, 4:8]) << 4)
    return _float16(b[:, :2]) * number.float() + _float16(b[:, 2:4])


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:].view(torch.int8).float() * _float16(b[:, :2])


def _quantize_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """float32 [rows, columns], columns a multiple of 32, to Q8_0 blocks."""
    blocks = weight.float().reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    number = (blocks / torch.where(scale > 0, scale, torch.ones_like(scale))).round_().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), number.view(torch.uint8)], dim=1).view(len(weight), -1)


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales, factors = b[:, :16], _float16(b[:, 80:84])
    scale = (factors[:, :1] * (scales & 15).float()).unsqueeze(2)
    offset = (factors[:, 1:] * (scales >> 4).float()).unsqueeze(2)
    number = _shifted(b[:, 16:80], 32, (0, 2, 4, 6), 3).unflatten(1, (16, 16)).float()
    return (scale * number - offset).flatten(1)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    low, high = _nibbles(b[:, 96:104], 8), _shifted(b[:, 104:108], 4, (0, 2, 4, 6), 3)
    scale = _float16(b[:, 108:110]) * ((low | (high << 4)).float() - 32)
    number = _shifted(b[:, 32:96], 32, (0, 2, 4, 6), 3).float()
    absent = (_shifted(b[:, :32], 32, tuple(range(8)), 1) ^ 1).float()  # of the third bit
    return (scale.unsqueeze(2) * (number - 4 * absent).unflatten(1, (16, 16))).flatten(1)


def _k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight scales and offsets of a Q4_K or Q5_K block, each [n, 8, 1] float32."""
    factors = _float16(b[:, :4])
    scale, offset, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], dim=1).float()
    offsets = torch.cat([offset & 63, (rest >> 4) | ((offset >> 2) & 48)], dim=1).float()
    return (factors[:, :1] * scales).unsqueeze(2), (factors[:, 1:] * offsets).unsqueeze(2)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scale, offset = _k_scales(b)
    number = _nibbles(b[:, 16:], 32).unflatten(1, (8, 32)).float()
    return (scale * number - offset).flatten(1)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scale, offset = _k_scales(b)
    high = _shifted(b[:, 16:48], 32, tuple(range(8)), 1)
    number = (_nibbles(b[:, 48:], 32) | (high << 4)).unflatten(1, (8, 32)).float()
    return (scale * number - offset).flatten(1)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    scale = _float16(b[:, 208:210]) * b[:, 192:208].view(torch.int8).float()
    high = _shifted(b[:, 128:192], 32, (0, 2, 4, 6), 3)
    number = (_nibbles(b[:, :128], 64) | (high << 4)).float() - 32
    return (scale.unsqueeze(2) * number.unflatten(1, (16, 16))).flatten(1)


BLOCKS = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q2_K": BlockFormat(256, 84, _q2_k),
    "Q3_K": BlockFormat(256, 110, _q3_k),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
"""The types of blocks that this module reads, by GGUF's names."""


@dataclass(frozen=True)
class GgufBlocks(Format):
    """Blocks of the type `dtype`, which GGUF's header names. A row is a sequence of whole blocks."""

    gguf_types: ClassVar[frozenset[str]] = frozenset(BLOCKS)
    dtype: str

    @classmethod
    def recognise(cls, stored: StoredTensor) -> GgufBlocks | None:
        """Recognise blocks by their type, which GGUF's header names."""
        return cls(stored.info.dtype) if stored.info.dtype in BLOCKS else None

    @property
    def name(self) -> str:
        """The type of the blocks behind "GGUF"."""
        return _name(self.dtype)

    def load(self, info: TensorInfo, read: Read) -> Weight:
        """Read a `GgufWeight`."""
        block = BLOCKS[self.dtype]
        columns = info.shape[-1] if len(info.shape) <= 2 else elements(info.shape[1:])
        return GgufWeight(self.dtype, read(info).view(-1, columns // block.numbers * block.nbytes), columns)


def _name(dtype: str) -> str:
    return f"GGUF {dtype}"
