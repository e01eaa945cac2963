"""Matrices that are held in fewer bits than the products with these matrices are computed in.

A matrix of the model is a plain tensor or a `QuantizedWeight`. Code that moves, shards or slices weights treats a plain
tensor directly and a `QuantizedWeight` through its methods, and needs no other knowledge of the format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch


class QuantizedWeight(ABC):
    """A matrix [rows, columns] that is dequantised each time it is used."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The logical shape, [rows, columns]."""

    @property
    @abstractmethod
    def format(self) -> str:
        """The user's name for the format."""

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
        """Bytes of all components."""
        return sum(tensor.nbytes for tensor in self.components().values())

    @property
    def device(self) -> torch.device:
        """The device that holds all components."""
        return next(iter(self.components().values())).device

    @property
    def ndim(self) -> int:
        """The number of dimensions of the logical shape, 2."""
        return len(self.shape)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight on `device`."""
        return self.replace({name: tensor.to(device) for name, tensor in self.components().items()})

    def contiguous(self) -> QuantizedWeight:
        """The weight with its rows next to each other in memory; a slice of columns has gaps between its rows."""
        return self.replace({name: tensor.contiguous() for name, tensor in self.components().items()})


Weight = torch.Tensor | QuantizedWeight


def rows_together(parts: Sequence[Weight]) -> Weight:
    """One weight of the rows of all `parts`, in their order; a single part is returned itself.

    Args:
        parts: rows of one weight, so all are tensors of one dtype or quantised in one format.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if not isinstance(first, QuantizedWeight):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    all_components = [part.components() for part in parts if isinstance(part, QuantizedWeight)]
    joined = {}
    for name, tensor in first.components().items():
        of_rows = len(tensor) == first.shape[0]  # else a scale of the whole matrix
        joined[name] = torch.cat([components[name] for components in all_components]) if of_rows else tensor
    return first.replace(joined)


def as_tensor(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Any weight as a plain tensor of `dtype`; not copied if it is a tensor of this dtype already."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def covering(start: int, length: int, group: int) -> tuple[int, int]:
    """The groups [first, last) of `group` columns that hold columns [start, start + length)."""
    return start // group, -(-(start + length) // group)
