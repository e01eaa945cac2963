"""Weights in float types, of safetensors and GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...base.tensor_info import FLOATS, TensorInfo
from ..format import Format, Read, StoredTensor
from ..quantized import Weight
from .scales import SCALED_NOTES

_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Float(Format):
    """A float tensor. Files may leave a layer in a float type even where a note says that the layer is scaled."""

    quantized: ClassVar[bool] = False
    dtype: str

    @classmethod
    def recognise(cls, stored: StoredTensor) -> Float | None:
        """Recognise a float tensor by its type."""
        known = stored.info.dtype in FLOATS and stored.noted_format in SCALED_NOTES
        return cls(stored.info.dtype) if known else None

    @property
    def name(self) -> str:
        """bf16, fp16 or fp32; the name in the file for float64."""
        return _NAMES.get(self.dtype, self.dtype)

    def load(self, info: TensorInfo, read: Read) -> Weight:
        """The tensor as the file has it."""
        return read(info)
