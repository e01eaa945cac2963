"""Matrices that are held in fewer bits than they are computed in.

A matrix of the model is a plain tensor or a `QuantizedWeight`. Whoever moves, shards or slices weights treats a plain
tensor directly and a quantised one through the methods here, and needs no other knowledge of the format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

FLOAT8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class QuantizedWeight(ABC):
    """A matrix [rows, columns] that is dequantised each time it is used."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The logical shape, [rows, columns]."""

    @property
    @abstractmethod
    def format(self) -> str:
        """The name of the format, as a user knows it."""

    @abstractmethod
    def components(self) -> dict[str, torch.Tensor]:
        """The tensors that hold the weight, by name."""

    @abstractmethod
    def replace(self, components: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The same weight in other component tensors, such as copies on another device."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in a float dtype, computed in float32 and rounded once, on the device of the components."""

    @abstractmethod
    def narrow(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """Rows (dim 0) or columns (dim 1) [start, start + length), exactly as `dequantize` would give them."""

    @abstractmethod
    def requantize(self, weight: torch.Tensor) -> QuantizedWeight:
        """`weight`, a changed form of this matrix in float32, in about as many bits."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.components().values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.components().values())).device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight on `device`."""
        return self.replace({name: tensor.to(device) for name, tensor in self.components().items()})

    def contiguous(self) -> QuantizedWeight:
        """The weight without what lies between its rows, as a slice of columns has it."""
        return self.replace({name: tensor.contiguous() for name, tensor in self.components().items()})


Weight = torch.Tensor | QuantizedWeight


def rows_together(parts: Sequence[Weight]) -> Weight:
    """One weight of the rows of several, which are rows of the same weight; a single one is that weight itself."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not isinstance(first, QuantizedWeight):
        return torch.cat(list(parts))
    joined = {}
    for name, tensor in first.components().items():
        of_rows = len(tensor) == first.shape[0]  # else a scale of the whole matrix
        joined[name] = torch.cat([part.components()[name] for part in parts]) if of_rows else tensor
    return first.replace(joined)


def as_tensor(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Any weight as a plain tensor of `dtype`; no copy where it is that already."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


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

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def format(self) -> str:
        name = "fp8 e4m3" if self.data.dtype == torch.float8_e4m3fn else "fp8 e5m2"
        return name if self.scale is None else f"scaled {name}"

    def components(self) -> dict[str, torch.Tensor]:
        return {"data": self.data} if self.scale is None else {"data": self.data, "scale": self.scale}

    def replace(self, components: Mapping[str, torch.Tensor]) -> Fp8Weight:
        return Fp8Weight(components["data"], components.get("scale"))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return _scaled(self.data, self.scale, dtype)

    def narrow(self, dim: int, start: int, length: int) -> Fp8Weight:
        return Fp8Weight(self.data.narrow(dim, start, length), _narrow_scale(self.scale, dim, start, length))

    def requantize(self, weight: torch.Tensor) -> Fp8Weight:
        return Fp8Weight.quantize(weight, self.data.dtype)


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
        return torch.Size((len(self.data), self.data.shape[1] if self.columns < 0 else self.columns))

    @property
    def format(self) -> str:
        return "int8 convrot" if self.rotation else "int8"

    def components(self) -> dict[str, torch.Tensor]:
        return {"data": self.data, "scale": self.scale}

    def replace(self, components: Mapping[str, torch.Tensor]) -> Int8Weight:
        return replace(self, data=components["data"], scale=components["scale"])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.rotation:
            weight = _scaled(self.data, self.scale, dtype)
        else:
            rotated = (self.data.float() * self.scale).unflatten(1, (-1, self.rotation))
            weight = (rotated @ _hadamard(self.rotation, self.data.device)).flatten(1).to(dtype)
        return weight.narrow(1, self.skip, self.shape[1])

    def narrow(self, dim: int, start: int, length: int) -> Int8Weight:
        scale = _narrow_scale(self.scale, dim, start, length)
        if dim == 0:
            return replace(self, data=self.data.narrow(0, start, length), scale=scale)
        group = self.rotation or 1
        first, last = covering(self.skip + start, length, group)
        data = self.data.narrow(1, first * group, (last - first) * group)
        return replace(self, data=data, scale=scale, skip=self.skip + start - first * group, columns=length)

    def requantize(self, weight: torch.Tensor) -> Int8Weight:
        return Int8Weight.quantize(weight)


def covering(start: int, length: int, group: int) -> tuple[int, int]:
    """The groups [first, last) of `group` columns that hold columns [start, start + length)."""
    return start // group, -(-(start + length) // group)


def scale_of(scale: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A scale as a file has it (a number, or one for each row) as float32 [1, 1] or [rows, 1].

    Raises:
        ValueError: it is neither.
    """
    if scale is None:
        return None
    if scale.numel() not in (1, rows):
        raise ValueError(f"a scale of {scale.numel()} numbers for {rows} rows")
    return scale.float().reshape(-1, 1)


def _scaled(data: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if scale is None:
        return data.to(dtype)
    if data.dtype.is_floating_point:
        data = data.to(dtype)  # exact: fp16 and bf16 hold every fp8 number
    # A 16-bit number times a float32 scale, rounded once, without a float32 matrix in memory on a GPU.
    return torch.mul(data, scale, out=torch.empty(data.shape, dtype=dtype, device=data.device))


def _narrow_scale(scale: torch.Tensor | None, dim: int, start: int, length: int) -> torch.Tensor | None:
    of_rows = dim == 0 and scale is not None and len(scale) > 1
    return scale.narrow(0, start, length) if of_rows else scale


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
