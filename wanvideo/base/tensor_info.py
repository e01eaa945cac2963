"""What is known of a model's tensors without reading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import UserError


class CheckpointError(UserError, ValueError):
    """The file cannot be used as a Wan DiT. The text says why and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Args:
        dtype: safetensors' or GGUF's name for how the numbers are written, such as BF16, F8_E4M3 or Q4_K, or NVFP4 or
            MXFP8.
        shape: its shape as a float tensor.
        file, key: the file that holds it, and its name there.
        offset, nbytes: where its bytes are in the file, and how many.
        scale: what its numbers are to be multiplied by; of NVFP4 and MXFP8 a number for each group of them.
        whole_scale: beside that, of NVFP4, one for all.
        rotation: columns that were rotated together before the numbers were rounded (see `Int8Weight`), or 0.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    key: str
    offset: int
    nbytes: int
    scale: TensorInfo | None = None
    whole_scale: TensorInfo | None = None
    rotation: int = 0


@dataclass(frozen=True)
class Contents:
    """The tensors of a model's files by their names there, and the metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


def elements(shape: Iterable[int]) -> int:
    """How many numbers a tensor of this shape has."""
    count = 1
    for size in shape:
        count *= size
    return count


def listed(names: list[str]) -> str:
    """The first five of some names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
