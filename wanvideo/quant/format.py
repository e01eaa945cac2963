"""The base class of the formats in which files store weights. A format recognises its tensors and gives their logical
shape, their weights, their bytes in memory, and a name for users.

A format is a subclass of `Format` in a module of formats/. Readers of files, memory estimates and refusals ask the
classes defined there (see formats/registry.py), and name none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ..base.tensor_info import TensorInfo
from .quantized import QuantizedWeight, Weight, as_tensor

Read = Callable[[TensorInfo], torch.Tensor]
"""A function that reads a tensor as its file stores the tensor, on the CPU. A GGUF tensor in no float type comes as its
bytes, uint8 [nbytes]."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file with everything that the file says about the tensor; formats recognise their tensors by it.

    Args:
        path: the model's file, which refusals name.
        name: the tensor's name in the file.
        info: its type, shape and position there.
        companions: the tensors that describe it, by the end of their names (see `Format.companions`).
        note: ComfyUI's note about its layer (`X.comfy_quant`, or of the metadata); empty without a note.
    """

    path: str
    name: str
    info: TensorInfo
    companions: Mapping[str, TensorInfo]
    note: Mapping[str, object]

    @property
    def file_name(self) -> str:
        """The name of the model's file without its folders."""
        return Path(self.path).name

    @property
    def noted_format(self) -> object:
        """The name of the format in ComfyUI's note, or None. A damaged file may have anything here."""
        return self.note.get("format")


class Format(ABC):
    """The format of one tensor of a file. Its fields are tensors of the file that describe the tensor, such as a scale.

    Defining a subclass registers it. Exactly one format may recognise a tensor, so that their order does not matter: a
    format of ComfyUI's is recognised from the note that names it, another one from its type in the file.
    """

    quantized: ClassVar[bool] = True
    """Whether the model holds matrices of this format as the file has them, instead of as float tensors."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of tensors that describe the weight of their layer: X.weight_scale describes X.weight."""
    markers: ClassVar[tuple[str, ...]] = ()
    """Names of tensors without meaning of their own, which mark the file."""
    gguf_types: ClassVar[frozenset[str]] = frozenset()
    """The types of GGUF tensors, by GGUF's names, that this format reads."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        FORMATS.append(cls)

    @classmethod
    @abstractmethod
    def recognise(cls, stored: StoredTensor) -> Format | None:
        """The format of a tensor, or None if the tensor is in another one.

        Raises:
            CheckpointError: the tensor is in this format, and damaged or of a kind that has no code here.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """The user's name for the format, such as scaled fp8 e4m3."""

    @property
    def fp8_products(self) -> bool:
        """Whether fp8_mode can multiply these weights as they are: `load` gives an `Fp8Weight` of e4m3 numbers."""
        return False

    def logical_shape(self, info: TensorInfo) -> tuple[int, ...]:
        """The shape of the float tensor that the stored tensor `info` stands for."""
        return info.shape

    @abstractmethod
    def load(self, info: TensorInfo, read: Read) -> Weight:
        """Read the weight, on the CPU. A tensor of other than two dimensions may come as a matrix of as many numbers.

        Args:
            info: the tensor, with its logical shape.
        """

    def storage_bytes(self, info: TensorInfo) -> int:
        """Bytes of the matrix `info` in memory, without parts as small as a scale for each row."""
        return info.nbytes


FORMATS: list[type[Format]] = []
"""Every format, once the package formats/ is imported: a subclass of `Format` adds itself."""


@dataclass(frozen=True)
class LogicalTensor(TensorInfo):
    """A tensor of a model: `shape` is the shape of the float tensor that the stored tensor stands for, `dtype` is the
    type in which the file stores the tensor, and `format` converts the stored tensor to the weight."""

    format: Format

    @property
    def is_quantized(self) -> bool:
        """Whether the model holds this tensor as the file has it, which is the case for quantised matrices. Other
        tensors of a quantised format are dequantised while the model is loaded."""
        return self.format.quantized and len(self.shape) == 2

    @property
    def storage_bytes(self) -> int:
        """Bytes in memory of a tensor that `is_quantized`, without parts as small as a scale for each row."""
        return self.format.storage_bytes(self)

    def load(self, read: Read) -> Weight:
        """Read the weight, on the CPU: a matrix that the file has quantised stays so, all else becomes a float tensor.

        Args:
            read: reads a tensor of the file by its `TensorInfo`.
        """
        weight = self.format.load(self, read)
        if isinstance(weight, QuantizedWeight) and len(self.shape) != 2:
            return weight.dequantize(torch.float32).view(self.shape)
        if isinstance(weight, torch.Tensor) and weight.shape != self.shape:
            return weight.reshape(self.shape)  # a file may have dimensions merged, see checkpoint/patch_shapes.py
        return weight


@dataclass(frozen=True)
class JoinedTensor(LogicalTensor):
    """A tensor of a model that a file has as several tensors: `parts`, one below the other. Its fields but `shape` and
    `nbytes` are those of the first part."""

    parts: tuple[LogicalTensor, ...]

    @classmethod
    def of(cls, parts: Sequence[LogicalTensor]) -> JoinedTensor:
        """Join tensors whose shapes agree but for their first dimension."""
        first, nbytes = parts[0], sum(part.nbytes for part in parts)
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return cls(first.dtype, shape, first.file, first.key, first.offset, nbytes, first.format, tuple(parts))

    @property
    def is_quantized(self) -> bool:
        """False: parts that the file has quantised are dequantised while the model is loaded."""
        return False

    def load(self, read: Read) -> Weight:
        """Read the parts as one float tensor, on the CPU."""
        return torch.cat([as_tensor(part.load(read), torch.float32) for part in self.parts])


@dataclass(frozen=True)
class PaddedTensor(LogicalTensor):
    """A tensor of a model with more columns than the tensor `inner` of the file; the further columns are zeros."""

    inner: LogicalTensor

    @classmethod
    def of(cls, inner: LogicalTensor, columns: int) -> PaddedTensor:
        """Pad a tensor of any number of dimensions to this size of its second dimension."""
        shape = (inner.shape[0], columns, *inner.shape[2:])
        return cls(inner.dtype, shape, inner.file, inner.key, inner.offset, inner.nbytes, inner.format, inner)

    @property
    def is_quantized(self) -> bool:
        """False, see `JoinedTensor.is_quantized`."""
        return False

    def load(self, read: Read) -> Weight:
        """Read the tensor of the file, on the CPU, and add the zeros."""
        weight = as_tensor(self.inner.load(read), torch.float32)
        padded = weight.new_zeros(self.shape)
        padded[:, : weight.shape[1]] = weight
        return padded
