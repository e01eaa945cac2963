"""Matrices with a scale for every few columns of a row, as ComfyUI's files have them: NVFP4 and MXFP8.

MXFP8 (OCP Microscaling Formats, version 1.0) has e4m3 numbers, and a power of two (E8M0) for every 32 numbers. NVFP4
(NVIDIA, Blackwell) has numbers of 4 bits (E2M1), a scale in e4m3 for every 16 numbers, and a float32 scale of the whole
matrix. Blackwell multiplies in both formats; this module dequantises them, which works on any GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import torch

from ...base.tensor_info import FLOATS, CheckpointError, TensorInfo, elements
from ...ops.pointwise import triton_in_use
from ..format import Format, Read, StoredTensor
from ..quantized import QuantizedWeight, Weight, covering
from .gguf_blocks import to_eight_bits
from .scales import INPUT_SCALES, SCALES, scale_info


@dataclass(frozen=True)
class ScaleGroup:
    """How many numbers of a row share a scale, and how many bytes hold these numbers."""

    numbers: int
    nbytes: int


GROUPS = {"NVFP4": ScaleGroup(16, 8), "MXFP8": ScaleGroup(32, 32)}
_TILE_ROWS, _TILE_GROUPS = 128, 4
_WHOLE_SCALE, _SMOOTHING = ".weight_scale_2", ".pre_quant_scale"
_STORED_AS = {"NVFP4": "U8", "MXFP8": "F8_E4M3"}
_SCALE_TYPES = ("U8", "F8_E4M3", "F8_E8M0")


@dataclass(frozen=True)
class BlockScaled(Format):
    """NVFP4 or MXFP8 (`kind`), with the tensor of the groups' scales and, for NVFP4, of the matrix's scale."""

    companions: ClassVar[tuple[str, ...]] = (*SCALES, *INPUT_SCALES, _WHOLE_SCALE, _SMOOTHING)
    kind: str
    scales: TensorInfo
    whole_scale: TensorInfo | None

    @classmethod
    def recognise(cls, stored: StoredTensor) -> BlockScaled | None:
        """Recognise NVFP4 and MXFP8 by ComfyUI's note, which names the format."""
        noted = stored.noted_format
        if noted not in ("nvfp4", "mxfp8") or _SMOOTHING in stored.companions:  # inputs would have to be scaled first
            return None
        kind, info, scales = str(noted).upper(), stored.info, scale_info(stored.companions)
        whole = stored.companions.get(_WHOLE_SCALE) if kind == "NVFP4" else None
        rows, width = info.shape if len(info.shape) == 2 else (0, 1)
        group = GROUPS[kind]
        one = whole is not None and whole.dtype in FLOATS and elements(whole.shape) == 1
        fits = info.dtype == _STORED_AS[kind] and width % group.nbytes == 0 and (one or kind != "NVFP4")
        count = elements(scales.shape) if scales is not None and scales.dtype in _SCALE_TYPES else 0
        if scales is None or not fits or count != scales_in_file(rows, width // group.nbytes):
            raise CheckpointError(
                f"{stored.file_name} has {stored.name} in {noted}, of which a scale is missing or of another size. "
                "Download it again, or use the fp8_scaled, GGUF or bf16 version of the model."
            )
        return cls(kind, scales, whole)

    @property
    def name(self) -> str:
        """nvfp4 or mxfp8."""
        return self.kind.lower()

    def logical_shape(self, info: TensorInfo) -> tuple[int, ...]:
        """The number of rows, and the number of numbers that the bytes of a row hold."""
        group, (rows, nbytes) = GROUPS[self.kind], info.shape
        return rows, nbytes // group.nbytes * group.numbers

    def load(self, info: TensorInfo, read: Read) -> Weight:
        """A `BlockScaledWeight`."""
        whole = None if self.whole_scale is None else read(self.whole_scale)
        return BlockScaledWeight.of_file(self.kind, read(info), read(self.scales), whole)

    def storage_bytes(self, info: TensorInfo) -> int:
        """The bytes of the numbers, and a byte for the scale of each group."""
        return info.nbytes + elements(info.shape) // GROUPS[self.kind].numbers


@dataclass(frozen=True, eq=False)
class BlockScaledWeight(QuantizedWeight):
    """`data` uint8 [rows, bytes of whole groups]; `scales` uint8 [rows, groups], e4m3 or E8M0; `scale` float32 [1, 1].

    A slice of columns keeps the groups that it touches: `skip` columns before it, and `columns` of its own.
    """

    kind: str
    data: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor
    columns: int
    skip: int = 0

    @classmethod
    def of_file(
        cls, kind: str, data: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor | None
    ) -> BlockScaledWeight:
        """Make a weight of the tensors of a file.

        Args:
            data: numbers in any type of one byte, [rows, bytes].
            scales: scales of the groups in any type of one byte, in the order of the tensor cores (see `in_rows`).
            scale: the scale of the matrix as a single number; None for 1.
        """
        data, whole = data.view(torch.uint8), torch.ones(1) if scale is None else scale.float()
        groups = data.shape[1] // GROUPS[kind].nbytes
        scales = in_rows(scales.view(torch.uint8), len(data), groups)
        return cls(kind, data, scales, whole.view(1, 1), groups * GROUPS[kind].numbers)

    @property
    def shape(self) -> torch.Size:
        """The logical shape, [rows, columns]."""
        return torch.Size((len(self.data), self.columns))

    @property
    def format(self) -> str:
        """nvfp4 or mxfp8."""
        return self.kind.lower()

    def components(self) -> dict[str, torch.Tensor]:
        """`data`, `scales` and `scale`."""
        return {"data": self.data, "scales": self.scales, "scale": self.scale}

    def replace(self, components: Mapping[str, torch.Tensor]) -> BlockScaledWeight:
        """The weight with other `data`, `scales` and `scale`."""
        return replace(self, data=components["data"], scales=components["scales"], scale=components["scale"])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """numbers * scales * scale, by a Triton kernel on a GPU where Triton works; its results are the same."""
        if not (self.data.is_cuda and triton_in_use()):
            return self.dequantize_by_torch(dtype)
        return import_module("..block_scaled_triton", __package__).dequantize(self, dtype)

    def dequantize_by_torch(self, dtype: torch.dtype) -> torch.Tensor:
        """`dequantize` in plain torch, which runs on any device."""
        numbers = self._numbers().to(dtype)  # exact: all floats hold these
        numbers = numbers.unflatten(1, (-1, GROUPS[self.kind].numbers))
        out = torch.empty_like(numbers)
        # a 16-bit number times a float32 scale, rounded once, without a float32 matrix in memory on a GPU
        torch.mul(numbers, self._factors()[:, :, None], out=out)
        return out.flatten(1).narrow(1, self.skip, self.columns)

    def narrow(self, dim: int, start: int, length: int) -> BlockScaledWeight:
        """Some rows, or some columns with all groups that these touch."""
        if dim == 0:
            return replace(self, data=self.data.narrow(0, start, length), scales=self.scales.narrow(0, start, length))
        group = GROUPS[self.kind]
        first, last = covering(self.skip + start, length, group.numbers)
        return replace(
            self,
            data=self.data.narrow(1, first * group.nbytes, (last - first) * group.nbytes),
            scales=self.scales.narrow(1, first, last - first),
            columns=length,
            skip=self.skip + start - first * group.numbers,
        )

    def requantize(self, weight: torch.Tensor) -> QuantizedWeight:
        """`weight` in 8 bits (see `to_eight_bits`): 4 bits would round away most of what a LoRA changes."""
        return to_eight_bits(weight)

    def _numbers(self) -> torch.Tensor:
        """The unscaled numbers [rows, columns of whole groups]: e4m3, or float16 in which 2**-14 stands for 1."""
        if self.kind == "MXFP8":
            return self.data.view(torch.float8_e4m3fn)
        codes = torch.stack((self.data >> 4, self.data & 15), dim=-1).flatten(1).to(torch.int16)
        # sign, two bits of exponent, one of mantissa: those of a float16 but for the range of the exponent
        return ((codes & 8) << 12 | (codes & 7) << 9).view(torch.float16)

    def _factors(self) -> torch.Tensor:
        """The factors of the numbers of each group, float32 [rows, groups]."""
        if self.kind == "MXFP8":
            return (self.scales.to(torch.int32) << 23).view(torch.float32)  # a float32's exponent; 2**-127 becomes 0
        return self.scales.view(torch.float8_e4m3fn).float() * (self.scale * 2**14)


def in_rows(scales: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Reorder `scales`, which files have in the order in which tensor cores read them, to [rows, groups].

    The scales come in tiles of 128 rows and 4 groups, tile after tile along the rows, padded to whole tiles. In a tile,
    the scales of rows i, 32 + i, 64 + i and 96 + i are neighbours (cuBLAS, "1D Block Scaling Factors Layout").

    Raises:
        ValueError: `scales` has more or fewer numbers.
    """
    if scales.numel() != scales_in_file(rows, groups):
        raise ValueError(f"{scales.numel()} scales for {rows} rows of {groups} groups")
    down, across = _tiles(rows, groups)
    tiles = scales.reshape(down, across, 32, 4, _TILE_GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * _TILE_ROWS, across * _TILE_GROUPS)[:rows, :groups].contiguous()


def scales_in_file(rows: int, groups: int) -> int:
    """How many scales a file has for `rows` rows of `groups` groups, padding included."""
    down, across = _tiles(rows, groups)
    return down * _TILE_ROWS * across * _TILE_GROUPS


def _tiles(rows: int, groups: int) -> tuple[int, int]:
    return -(-rows // _TILE_ROWS), -(-groups // _TILE_GROUPS)
