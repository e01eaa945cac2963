"""The header of a safetensors file, checked by the rules of the safetensors library, which reads the weights later.

The file may hold anything. It is read entry by entry, so that time and memory are bounded by the size of the header,
and no step keeps other threads of the process from running for long.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors

from ..base.regular_file import FileIdentity, not_opened_again, open_regular, path_of, stamp_of
from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, elements, shortened

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
MAX_TENSORS = 65_536
"""More than any published model has, and few enough for their checks to take no time."""
MAX_NAME = 1_000
"""Letters of a tensor's name."""
_MAX_ENTRY = 4_096
"""Letters of the type, shape and position of one tensor."""
_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""The bits of a number in each of safetensors' types."""
_SPACE = re.compile(r"[ \t\n\r]*")
_LIMIT = 2**64  # numbers are unsigned, of 64 bits


class _Corrupt(ValueError):
    """The header breaks a rule."""


def read_safetensors(path: str) -> FileHeader:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, no regular file, cut short, corrupt, or of another kind.
    """
    name = Path(path).name
    with open_regular(path) as file:
        identity = FileIdentity.of(file)
        raw = _header_bytes(name, file, identity.size)
        try:
            metadata, entries = _parsed(raw.decode())
            tensors = dict(_tensors(path, entries, 8 + len(raw)))
            end = _end_of_weights(tensors, 8 + len(raw))
        except (ValueError, RecursionError):  # of the decoder too
            raise CheckpointError(f"The header of {name} is corrupt. Download the file again.") from None
        _check_end(name, end, identity.size, 8 + len(raw))
        _check_with_library(name, file, tensors)
    return FileHeader(tensors, metadata, {path: identity}, stamp_of(identity, raw))


def _header_bytes(name: str, file: BinaryIO, size: int) -> bytes:
    try:
        start = file.read(9)  # the length of the header, and the header's "{"
        _refuse_other_containers(name, start)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{name} is not a safetensors file, or its download stopped early. Download it again."
            )
        file.seek(8)
        return file.read(length)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}. Check its disk.") from error


def _refuse_other_containers(name: str, start: bytes) -> None:
    # The length of a safetensors header can begin with either magic number as well.
    pickled = start[8:] != b"{" and start.startswith((b"PK", b"\x80"))
    if pickled or Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise CheckpointError(
            f"{name} is a pickle file, which can run code when it is opened. Use its .safetensors version."
        )
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{name} is a GGUF file under another name. Rename it, so that it ends in .gguf.")


def _parsed(text: str) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The metadata and the entries of the tensors in the JSON of a header."""
    reader, metadata = _Reader(text), None
    entries: dict[str, dict[str, Any]] = {}
    for name in reader.names():
        if name == "__metadata__":
            if metadata is not None:
                raise _Corrupt
            metadata = reader.metadata()
        elif name in entries or len(name) > MAX_NAME or len(entries) == MAX_TENSORS:
            raise _Corrupt
        else:
            entries[name] = reader.entry()
    reader.end()
    return metadata or {}, entries


class _Reader:
    """Reads one JSON object of objects from its beginning to its end. Raises ValueError at anything else."""

    def __init__(self, text: str):
        self._text, self._at = text, _past_space(text, 0)
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refused, parse_float=_refused)

    def names(self) -> Iterator[str]:
        """The keys of an object. The value behind each must be read before the next key is asked for."""
        self._take("{")
        if self._next("}"):
            return
        while True:
            name = self._string()
            self._take(":")
            yield name
            if self._next("}"):
                return
            self._take(",")

    def metadata(self) -> dict[str, str]:
        """An object of texts."""
        if self._text.startswith("null", self._at):
            self._at = _past_space(self._text, self._at + 4)
            return {}
        found: dict[str, str] = {}
        for name in self.names():
            if name in found:
                raise _Corrupt
            found[name] = self._string()
        return found

    def entry(self) -> dict[str, Any]:
        """The object of one tensor."""
        if not self._text.startswith("{", self._at):
            raise _Corrupt
        found, length = self._decoder.raw_decode(self._text[self._at : self._at + _MAX_ENTRY])
        self._at = _past_space(self._text, self._at + length)
        return found

    def end(self) -> None:
        """The end of the text."""
        if self._at != len(self._text):
            raise _Corrupt

    def _string(self) -> str:
        if not self._text.startswith('"', self._at):
            raise _Corrupt
        found, end = self._decoder.raw_decode(self._text, self._at)
        found.encode()  # half a surrogate pair is no text
        self._at = _past_space(self._text, end)
        return found

    def _next(self, letter: str) -> bool:
        found = self._text.startswith(letter, self._at)
        if found:
            self._at = _past_space(self._text, self._at + 1)
        return found

    def _take(self, letter: str) -> None:
        if not self._next(letter):
            raise _Corrupt


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Corrupt
    return found


def _refused(_literal: str) -> None:
    raise _Corrupt


def _tensors(path: str, entries: dict[str, dict[str, Any]], start: int) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of a header whose weights begin at the byte `start`."""
    for name, entry in entries.items():
        dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
        if not isinstance(dtype, str) or len(offsets) != 2:
            raise _Corrupt
        nbytes = offsets[1] - offsets[0]
        if nbytes < 0 or (dtype in _BITS and elements(shape) * _BITS[dtype] != 8 * nbytes):
            raise _Corrupt
        yield name, TensorInfo(dtype, shape, path, name, start + offsets[0], nbytes)


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < _LIMIT for number in value):
        raise _Corrupt
    return tuple(value)


def _end_of_weights(tensors: dict[str, TensorInfo], start: int) -> int:
    """The byte behind the last tensor. One tensor begins where another one ends."""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != start:
            raise _Corrupt
        start += info.nbytes
    return start


def _check_end(name: str, end: int, size: int, start: int) -> None:
    if end > size:
        raise CheckpointError(
            f"{name} is cut short: {size - start:,} of {end - start:,} bytes of weights are there. Download it again."
        )
    if end < size:
        raise CheckpointError(
            f"{name} has {size - end:,} bytes behind its last tensor, which the safetensors library refuses. "
            "Download it again."
        )


def _check_with_library(name: str, file: BinaryIO, tensors: dict[str, TensorInfo]) -> None:
    """Refuse what the installed safetensors library would refuse when it reads the weights."""
    try:
        with safetensors.safe_open(path_of(file), framework="np"):
            return
    except OSError as error:
        raise not_opened_again(name) from error
    except safetensors.SafetensorError as error:
        unknown = sorted({shortened(info.dtype) for info in tensors.values()} - _BITS.keys())
        what = f"has tensors of the type {unknown[0]}" if unknown else "has a header"
        raise CheckpointError(
            f"{name} {what} that version {safetensors.__version__} of the safetensors library cannot read. "
            "Update the library, or use another version of the model."
        ) from error
