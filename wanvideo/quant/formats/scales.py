"""Scales of a whole matrix or of each row: their names in files, their checks, and products of numbers with scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...base.tensor_info import FLOATS, CheckpointError, TensorInfo, elements
from ..format import StoredTensor

SCALES = (".weight_scale", ".scale_weight")
"""Ends of the names of a scale, as newer and older versions of ComfyUI write them."""
INPUT_SCALES = (".scale_input", ".input_scale")
"""Ends of the names of scales of a layer's inputs, which are not rounded here."""
SCALED_NOTES = (None, "float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
"""ComfyUI's notes of layers with at most one scale a row; None is no note. The tensor's type shows the number type."""


def scale_info(companions: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The scale among the tensors that describe a weight."""
    return next((companions[end] for end in SCALES if end in companions), None)


def check_scale(stored: StoredTensor, scale: TensorInfo) -> None:
    """Refuse a scale that is no float, or neither one number for its weight nor one for each row.

    Raises:
        CheckpointError: the scale is of such a kind.
    """
    info = stored.info
    rows = info.shape[0] if len(info.shape) > 1 else 1
    if scale.dtype not in FLOATS or elements(scale.shape) not in (1, rows):
        raise CheckpointError(
            f"{stored.file_name} has a scale of shape {list(scale.shape)} ({scale.dtype}) for {stored.name} of shape "
            f"{list(info.shape)}, which this version cannot read. Use the fp8_scaled or bf16 version of the model."
        )


def scale_of(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """A scale as a file has it (a number, or one for each row) as float32 [1, 1] or [rows, 1].

    Raises:
        ValueError: the scale has another number of numbers.
    """
    if scale.numel() not in (1, rows):
        raise ValueError(f"a scale of {scale.numel()} numbers for {rows} rows")
    return scale.float().reshape(-1, 1)


def scaled(data: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """data * scale in `dtype`, rounded once.

    Args:
        data: fp8 or int8 [rows, columns].
        scale: float32 [1, 1] or [rows, 1]; None is 1.
    """
    if scale is None:
        return data.to(dtype)
    if data.dtype.is_floating_point:
        data = data.to(dtype)  # exact: fp16 and bf16 hold every fp8 number
    # A 16-bit number times a float32 scale, rounded once, without a float32 matrix in memory on a GPU.
    return torch.mul(data, scale, out=torch.empty(data.shape, dtype=dtype, device=data.device))


def narrow_scale(scale: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """The scale [1, 1] or [rows, 1] of rows (dim 0) or columns (dim 1) [start, start + length) of its matrix."""
    return scale.narrow(0, start, length) if dim == 0 and len(scale) > 1 else scale
