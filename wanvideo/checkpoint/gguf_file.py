"""The header of a GGUF file, through the gguf package of llama.cpp's authors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, unreadable
from ..quant.formats.registry import is_gguf_type

if TYPE_CHECKING:
    from gguf import GGUFReader

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Start of the metadata in which ComfyUI-GGUF's converter notes the shapes of tensors that it had to reshape."""


def read_gguf(path: str) -> FileHeader:
    """The tensors of a GGUF file, with their logical shapes (a GGUF header has them in reverse).

    Raises:
        CheckpointError: the gguf package is missing, or the file is missing, cut short, corrupt, or in a format
            without code here.
    """
    reader = _open(path)
    tensors = {}
    for tensor in reader.tensors:
        dtype = tensor.tensor_type.name
        if dtype not in _PLAIN and not is_gguf_type(dtype):
            raise CheckpointError(
                f"{Path(path).name} has {dtype} tensors, which this version cannot read. "
                "Use the Q4_K, Q5_K, Q6_K or Q8_0 version of the model."
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))
        field = reader.fields.get(_ORIGINAL_SHAPE + tensor.name)
        if field is not None:
            shape = tuple(int(field.parts[place][0]) for place in field.data)
        tensors[tensor.name] = TensorInfo(dtype, shape, path, tensor.name, int(tensor.data_offset), int(tensor.n_bytes))
    return FileHeader(tensors)


def map_file(path: str) -> torch.Tensor:
    """The bytes of a file, memory-mapped, as uint8."""
    return torch.from_numpy(numpy.memmap(path, dtype=numpy.uint8, mode="c"))  # "c": torch wants writable memory


def gguf_tensor(info: TensorInfo, file: torch.Tensor) -> torch.Tensor:
    """A tensor of a mapped GGUF file: a float tensor in its shape, any other tensor as its bytes, uint8 [nbytes]."""
    data = file[info.offset : info.offset + info.nbytes]
    if info.dtype in _PLAIN:
        return data.view(_PLAIN[info.dtype]).view(info.shape)
    return data


def _open(path: str) -> GGUFReader:
    name = Path(path).name
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(
            f"{name} is a GGUF file, and the gguf package that reads it is not installed. "
            f"Run '{sys.executable} -m pip install gguf', and restart ComfyUI."
        ) from None
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start and start != b"GGUF":
            raise CheckpointError(f"{name} is not a GGUF file, whatever its name. Download it again.")
        return GGUFReader(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError:
        raise
    # the errors of the package at an early end of the file, or at numbers without meaning
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{name} is cut short or its header is corrupt. Download it again.") from error
