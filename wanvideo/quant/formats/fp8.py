"""Weights in fp8: plain, scaled by ComfyUI or kijai, or rounded while a float file is loaded.

There are two kinds of scaled fp8: ComfyUI's older one (`scaled_fp8`, `X.scale_weight`, `X.scale_input`), and its newer
one (`X.comfy_quant` or the metadata `_quantization_metadata`, `X.weight_scale`, `X.input_scale`), which kijai's files
resemble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...base.tensor_info import TensorInfo
from ..format import Format, Read, StoredTensor
from ..quantized import QuantizedWeight, Weight
from .scales import INPUT_SCALES, SCALED_NOTES, SCALES, check_scale, narrow_scale, scale_info, scale_of, scaled

FLOAT8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""The types to which float weights can be rounded at load, by the names of the nodes' settings."""
_E4M3, _E5M2 = "F8_E4M3", "F8_E5M2"


@dataclass(frozen=True)
class Fp8(Format):
    """Numbers in fp8 of the type `dtype`, with the tensor of their scale; None where the numbers have no scale."""

    companions: ClassVar[tuple[str, ...]] = (*SCALES, *INPUT_SCALES)
    markers: ClassVar[tuple[str, ...]] = ("scaled_fp8",)
    dtype: str
    scale: TensorInfo | None

    @classmethod
    def recognise(cls, stored: StoredTensor) -> Fp8 | None:
        """Recognise fp8 by its type, unless a note names a format with other scales, such as mxfp8."""
        if stored.info.dtype not in (_E4M3, _E5M2) or stored.noted_format not in SCALED_NOTES:
            return None
        scale = scale_info(stored.companions)
        if scale is not None:
            check_scale(stored, scale)
        return cls(stored.info.dtype, scale)

    @property
    def name(self) -> str:
        """fp8 e4m3 or fp8 e5m2, after "scaled" where there is a scale."""
        return _name(self.dtype == _E4M3, self.scale is not None)

    @property
    def fp8_products(self) -> bool:
        """Whether the numbers are e4m3, the only type that products in fp8 take."""
        return self.dtype == _E4M3

    def load(self, info: TensorInfo, read: Read) -> Weight:
        """Read an `Fp8Weight`; a tensor that is no matrix becomes one row for each index of its first dimension."""
        data = read(info)
        data = data.view(len(data), -1) if data.ndim > 1 else data.view(1, -1)
        return Fp8Weight(data, None if self.scale is None else scale_of(read(self.scale), len(data)))


@dataclass(frozen=True, eq=False)
class Fp8Weight(QuantizedWeight):
    """data * scale. `data` [rows, columns] is float8_e4m3fn or float8_e5m2; `scale` float32, [1, 1] for the whole
    matrix or [rows, 1] for each output channel, or None where the numbers stand for themselves."""

    data: torch.Tensor
    scale: torch.Tensor | None = None

    @classmethod
    def quantize(cls, weight: torch.Tensor, dtype: torch.dtype) -> Fp8Weight:
        """Round a matrix to nearest with one scale for each output channel, which takes its largest value to the
        largest of the format."""
        weight = weight.float()
        largest = torch.finfo(dtype).max
        scale = weight.abs().amax(dim=1, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        data = (weight / scale).clamp_(-largest, largest).to(dtype)  # torch's cast overflows to NaN
        return cls(data, scale)

    @staticmethod
    def quantized_bytes(shape: Sequence[int]) -> int:
        """Bytes of a matrix of this shape after `quantize`: the fp8 numbers, and a float32 scale for each row."""
        return math.prod(shape) + 4 * shape[0]

    @property
    def shape(self) -> torch.Size:
        """The logical shape, [rows, columns]."""
        return self.data.shape

    @property
    def format(self) -> str:
        """fp8 e4m3 or fp8 e5m2, after "scaled" where there is a scale."""
        return _name(self.data.dtype == torch.float8_e4m3fn, self.scale is not None)

    def components(self) -> dict[str, torch.Tensor]:
        """The tensor `data`, and the tensor `scale` of a weight with a scale."""
        return {"data": self.data} if self.scale is None else {"data": self.data, "scale": self.scale}

    def replace(self, components: Mapping[str, torch.Tensor]) -> Fp8Weight:
        """The weight with other `data` and `scale`."""
        return Fp8Weight(components["data"], components.get("scale"))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """data * scale, rounded once."""
        return scaled(self.data, self.scale, dtype)

    def narrow(self, dim: int, start: int, length: int) -> Fp8Weight:
        """Some rows with their scales, or some columns with the scales of all rows."""
        scale = None if self.scale is None else narrow_scale(self.scale, dim, start, length)
        return Fp8Weight(self.data.narrow(dim, start, length), scale)

    def requantize(self, weight: torch.Tensor) -> Fp8Weight:
        """`quantize` in the same type, with one scale for each output channel."""
        return Fp8Weight.quantize(weight, self.data.dtype)


def _name(e4m3: bool, is_scaled: bool) -> str:
    return ("scaled " if is_scaled else "") + ("fp8 e4m3" if e4m3 else "fp8 e5m2")
