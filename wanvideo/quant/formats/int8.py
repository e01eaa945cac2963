"""ComfyUI's int8 weights, rotated before they were rounded (ConvRot) or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from ...base.tensor_info import CheckpointError, TensorInfo
from ..format import Format, Read, StoredTensor
from ..quantized import QuantizedWeight, Weight, covering
from .scales import SCALES, check_scale, narrow_scale, scale_info, scale_of, scaled

_ROTATIONS = (0, 4, 16, 64, 256, 1024)
_DEFAULT_ROTATION = 256  # ComfyUI's, where a note gives none


@dataclass(frozen=True)
class Int8(Format):
    """Numbers in int8 with the tensor `scale`; groups of `rotation` columns were rotated, none for 0."""

    companions: ClassVar[tuple[str, ...]] = SCALES
    scale: TensorInfo
    rotation: int

    @classmethod
    def recognise(cls, stored: StoredTensor) -> Int8 | None:
        """Recognise int8 by its type, the note int8_tensorwise and a scale."""
        scale = scale_info(stored.companions)
        if stored.info.dtype != "I8" or stored.noted_format != "int8_tensorwise" or scale is None:
            return None
        rotation = _rotation(stored)
        check_scale(stored, scale)
        return cls(scale, rotation)

    @property
    def name(self) -> str:
        """int8 convrot where columns are rotated, else int8."""
        return _name(self.rotation)

    def load(self, info: TensorInfo, read: Read) -> Weight:
        """Read an `Int8Weight`."""
        data = read(info)
        return Int8Weight(data, scale_of(read(self.scale), len(data)), self.rotation)


@dataclass(frozen=True, eq=False)
class Int8Weight(QuantizedWeight):
    """data * scale, in groups of `rotation` columns multiplied by a Hadamard matrix (ConvRot; 0: not rotated).

    `data` int8 [rows, whole groups of columns], `scale` float32 [1, 1] or [rows, 1]. A slice of columns keeps the
    groups that it touches: `skip` columns before it, and `columns` of its own.
    """

    data: torch.Tensor
    scale: torch.Tensor
    rotation: int = 0
    skip: int = 0
    columns: int = -1  # -1: all

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Int8Weight:
        """Round a matrix to nearest with one scale for each output channel, unrotated."""
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return cls((weight / scale).round_().to(torch.int8), scale)

    @property
    def shape(self) -> torch.Size:
        """The logical shape, [rows, columns]."""
        return torch.Size((len(self.data), self.data.shape[1] if self.columns < 0 else self.columns))

    @property
    def format(self) -> str:
        """int8 convrot where columns are rotated, else int8."""
        return _name(self.rotation)

    def components(self) -> dict[str, torch.Tensor]:
        """`data` and `scale`."""
        return {"data": self.data, "scale": self.scale}

    def replace(self, components: Mapping[str, torch.Tensor]) -> Int8Weight:
        """The weight with other `data` and `scale`."""
        return replace(self, data=components["data"], scale=components["scale"])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """data * scale, rotated back in float32 where it is rotated, rounded once."""
        if not self.rotation:
            weight = scaled(self.data, self.scale, dtype)
        else:
            rotated = (self.data.float() * self.scale).unflatten(1, (-1, self.rotation))
            weight = (rotated @ _hadamard(self.rotation, self.data.device)).flatten(1).to(dtype)
        return weight.narrow(1, self.skip, self.shape[1])

    def narrow(self, dim: int, start: int, length: int) -> Int8Weight:
        """Some rows with their scales, or some columns with all groups that these touch."""
        scale = narrow_scale(self.scale, dim, start, length)
        if dim == 0:
            return replace(self, data=self.data.narrow(0, start, length), scale=scale)
        group = self.rotation or 1
        first, last = covering(self.skip + start, length, group)
        data = self.data.narrow(1, first * group, (last - first) * group)
        return replace(self, data=data, scale=scale, skip=self.skip + start - first * group, columns=length)

    def requantize(self, weight: torch.Tensor) -> Int8Weight:
        """`quantize`, unrotated, with one scale for each output channel."""
        return Int8Weight.quantize(weight)


def _rotation(stored: StoredTensor) -> int:
    """The number of columns that were rotated together, read from the note.

    Raises:
        CheckpointError: columns in groups of this size cannot be rotated back.
    """
    params, shape = stored.note.get("params"), stored.info.shape
    options = {**(params if isinstance(params, dict) else {}), **stored.note}
    size = options.get("convrot_groupsize", _DEFAULT_ROTATION) if options.get("convrot") else 0
    if size not in _ROTATIONS or len(shape) != 2 or (size and shape[1] % size):
        raise CheckpointError(
            f"{stored.file_name} has {stored.name} rotated in groups of {size} columns, which this version cannot "
            "undo. Use the fp8_scaled or bf16 version of the model."
        )
    return size


def _name(rotation: int) -> str:
    return "int8 convrot" if rotation else "int8"


@cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The regular Hadamard matrix of ConvRot, [size, size] float32, orthogonal and symmetric: its own inverse.

    The Kronecker power of the 4 x 4 matrix of ones with -1 on the antidiagonal.
    """
    four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5
