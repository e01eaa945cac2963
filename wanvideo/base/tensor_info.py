"""Type, shape and position of each tensor of a model's files, known from the headers without reading the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .user_error import UserError

if TYPE_CHECKING:
    from .regular_file import FileIdentity


class CheckpointError(UserError, ValueError):
    """The file cannot be used as a Wan DiT. The text says why and what to do."""


def unreadable(path: str, error: OSError) -> CheckpointError:
    """The error that tells a user that the checkpoint at `path` could not be opened or read."""
    name = Path(path).name
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{name} does not exist. Put the file into ComfyUI's models/diffusion_models folder.")
    return CheckpointError(
        f"{name} cannot be read: {error.strerror}. Choose a file, and check its permissions and its disk."
    )


FLOATS = ("F64", "F32", "F16", "BF16")
"""The float types of more than a byte, by the names that safetensors and GGUF share."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Args:
        dtype: safetensors' or GGUF's name for the type in which the file stores it, such as BF16, F8_E4M3 or Q4_K.
        shape: its shape.
        file, key: the file that holds it, and its name there.
        offset, nbytes: where its bytes are in the file, and how many.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    key: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileHeader:
    """The headers of a model's files: the tensors by their names in the files, and the metadata.

    Args:
        identities: what tells each file from a changed one, by the path of the file.
        stamp: a text that changes with any file and with any header.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[str, FileIdentity] = field(default_factory=dict)
    stamp: str = ""


def elements(shape: Iterable[int]) -> int:
    """How many numbers a tensor of this shape has."""
    count = 1
    for size in shape:
        count *= size
    return count


def listed(names: list[str]) -> str:
    """A text with the first five of `names`, none longer than a line, and the number of the other names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shortened(name) for name in names[:5]) + more


def shortened(name: str) -> str:
    """A name from a file, or from a prompt, as an error can show it: on one line, and not longer than 100 letters."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
