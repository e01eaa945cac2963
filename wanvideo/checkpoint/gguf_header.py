"""The header of a GGUF file (ggml's docs/gguf.md, versions 2 and 3), read without the gguf package.

The file may hold anything: every count is compared with the file's size before it is followed, and what has no meaning
here, such as the vocabulary of a language model, is passed over without being read.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..base.regular_file import FileIdentity, open_regular, stamp_of
from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, elements
from ..quant.formats.registry import is_gguf_type
from .safetensors_header import MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS

PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
"""The float types, and the bytes of a number."""
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Start of the metadata in which ComfyUI-GGUF's converter notes the shapes of tensors that it had to reshape."""
_ALIGNMENT = "general.alignment"
_MAX_DIMS = 8  # a convolution's weight has 5
_MAX_FIELDS = 65_536
_MAX_TEXTS = 4_000_000  # ten times the vocabulary of a language model
_MAX_NESTING = 4
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of numbers in metadata, as the module struct calls them."""
_INTEGERS = "BbHhIiQq"
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
"""The types of tensors by their numbers in files: name, numbers in a block, bytes of a block."""


class _CorruptGguf(ValueError):
    """The header breaks a rule."""


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor as the header has it: `shape` is reversed already, and `offset` counts from the first tensor's byte."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass
class _Metadata:
    """The metadata that means something here, and how many texts and arrays may still come in the rest of it."""

    alignment: int = 32
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    texts_left: int = _MAX_TEXTS


def read_gguf(path: str) -> FileHeader:
    """The tensors of a GGUF file, with their logical shapes (a GGUF header has them in reverse).

    Raises:
        CheckpointError: the file is missing, no regular file, cut short, corrupt, or in a format without code here.
    """
    name = Path(path).name
    with open_regular(path) as file:
        identity = FileIdentity.of(file)
        reader = _BoundedReader(file, identity.size)
        try:
            _check_kind(name, reader)
            metadata, stored = _parsed_gguf(reader)
            start = -(-reader.at // metadata.alignment) * metadata.alignment
            tensors = {tensor.name: _info(path, tensor, start, identity.size, metadata) for tensor in stored}
            _refuse_overlap(tensors)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}. Check its disk.") from error
        except _CorruptGguf:
            raise CheckpointError(f"{name} is cut short or its header is corrupt. Download it again.") from None
    return FileHeader(tensors, {}, {path: identity}, stamp_of(identity, reader.digest))


class _BoundedReader:
    """Reads a header from an open file of `size` bytes. Raises _CorruptGguf where the file ends or the header is too
    long.

    Attributes:
        at: the byte that is read next.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._read, self.at = file, size, 0, 0
        self._content = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> bytes:
        """A digest of all that was read."""
        return self._content.digest()

    @property
    def left(self) -> int:
        """Bytes of the file behind those that were read."""
        return self._size - self.at

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        self._read += nbytes
        if nbytes > self.left or self._read > MAX_HEADER_BYTES:
            raise _CorruptGguf
        data = self._file.read(nbytes)
        if len(data) < nbytes:  # the file has become shorter
            raise _CorruptGguf
        self.at += nbytes
        self._content.update(data)
        return data

    def skip(self, nbytes: int) -> None:
        """Pass over bytes without reading them."""
        if nbytes > self.left:
            raise _CorruptGguf
        self.at = self._file.seek(self.at + nbytes)

    def number(self, kind: str) -> int:
        """The next number, of a type of the module struct."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, least: int, most: int) -> int:
        """The next 64-bit number, of things that take at least `least` bytes each; there are no more than `most`."""
        found = self.number("Q")
        if found > min(most, self.left // least):
            raise _CorruptGguf
        return found

    def name(self) -> str:
        """The next text, which is a name."""
        length = self.number("Q")
        if length > MAX_NAME:
            raise _CorruptGguf
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _CorruptGguf from None


def _check_kind(name: str, reader: _BoundedReader) -> None:
    if reader.left >= 4 and reader.take(4) != b"GGUF":
        raise CheckpointError(f"{name} is not a GGUF file, whatever its name. Download it again.")
    version = reader.number("I")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{name} is a GGUF file for big-endian machines. Use the usual one.")
    if version not in (2, 3):
        raise CheckpointError(f"{name} is a GGUF file of version {version}; 2 and 3 can be read. Use a newer file.")


def _parsed_gguf(reader: _BoundedReader) -> tuple[_Metadata, list[_StoredTensor]]:
    tensor_count, field_count = reader.number("Q"), reader.number("Q")
    # Least bytes: a tensor has a name's length, a number of dimensions, a type and an offset; a field an 8-bit number.
    if tensor_count > min(MAX_TENSORS, reader.left // 24) or field_count > min(_MAX_FIELDS, reader.left // 13):
        raise _CorruptGguf
    metadata, names = _Metadata(), {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    for _ in range(field_count):
        name = reader.name()
        if name in names:
            raise _CorruptGguf
        names.add(name)
        _read_field(reader, name, metadata)
    stored = [_stored_tensor(reader) for _ in range(tensor_count)]
    if len({tensor.name for tensor in stored}) < len(stored):
        raise _CorruptGguf
    return metadata, stored


def _read_field(reader: _BoundedReader, name: str, metadata: _Metadata) -> None:
    kind = reader.number("I")
    if name == _ALIGNMENT:
        if kind != _UINT32:
            raise _CorruptGguf
        metadata.alignment = reader.number("I")
        if metadata.alignment.bit_count() != 1:  # no power of two
            raise _CorruptGguf
    elif name.startswith(_ORIGINAL_SHAPE):
        if kind != _ARRAY:
            raise _CorruptGguf
        number = _NUMBERS.get(reader.number("I"), "")
        if number not in _INTEGERS or not number:
            raise _CorruptGguf
        shape = tuple(reader.number(number) for _ in range(reader.count(struct.calcsize(number), _MAX_DIMS)))
        metadata.shapes[name.removeprefix(_ORIGINAL_SHAPE)] = shape
    else:
        _skip_value(reader, kind, metadata)


def _skip_value(reader: _BoundedReader, kind: int, metadata: _Metadata, nesting: int = 0) -> None:
    """Pass over a value of metadata."""
    if kind in _NUMBERS:
        reader.skip(struct.calcsize(f"<{_NUMBERS[kind]}"))
    elif kind == _STRING:
        reader.skip(reader.number("Q"))
    elif kind == _ARRAY and nesting < _MAX_NESTING:
        item = reader.number("I")
        if item in _NUMBERS:
            reader.skip(reader.number("Q") * struct.calcsize(f"<{_NUMBERS[item]}"))
            return
        count = reader.count(8 if item == _STRING else 12, metadata.texts_left)
        metadata.texts_left -= count
        for _ in range(count):
            _skip_value(reader, item, metadata, nesting + 1)
    else:
        raise _CorruptGguf


def _stored_tensor(reader: _BoundedReader) -> _StoredTensor:
    name, dims = reader.name(), reader.number("I")
    if dims > _MAX_DIMS:
        raise _CorruptGguf
    shape = tuple(reader.number("Q") for _ in range(dims))
    return _StoredTensor(name, shape[::-1], reader.number("I"), reader.number("Q"))


def _info(path: str, tensor: _StoredTensor, start: int, size: int, metadata: _Metadata) -> TensorInfo:
    """A tensor with its place in the file, where the tensors begin at the byte `start`."""
    dtype, numbers, nbytes = _TYPES.get(tensor.type, (f"type {tensor.type}", 1, 0))
    if dtype not in PLAIN and not is_gguf_type(dtype):
        raise CheckpointError(
            f"{Path(path).name} has {dtype} tensors, which this version cannot read. "
            "Use the Q4_K, Q5_K, Q6_K or Q8_0 version of the model."
        )
    shape = metadata.shapes.get(tensor.name, tensor.shape)
    count, offset = elements(tensor.shape), start + tensor.offset
    total = count // numbers * nbytes
    whole = all(given and given[-1] % numbers == 0 for given in (tensor.shape, shape)) or numbers == 1
    if not whole or min(shape, default=1) < 1 or elements(shape) != count:
        raise _CorruptGguf
    if offset + total > size or offset % PLAIN.get(dtype, 1):  # torch reads aligned floats alone
        raise _CorruptGguf
    return TensorInfo(dtype, shape, path, tensor.name, offset, total)


def _refuse_overlap(tensors: dict[str, TensorInfo]) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise _CorruptGguf
        end = info.offset + info.nbytes
