"""Reads the headers of a model's files: the names, types, shapes and positions of the tensors, and the metadata.

A model is one safetensors or GGUF file, or a folder of safetensors files (shards) with an index, as diffusers and
Wan's authors publish it.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, elements, listed, unreadable
from .gguf_file import read_gguf

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ITEM_BYTES = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""The bytes of a number in each of safetensors' types that has whole bytes."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_INDEX = ".safetensors.index.json"


def read_file_header(path: str) -> FileHeader:
    """Read the header of a file, or the headers of all files of a folder or of a shard's model, joined to one.

    Raises:
        CheckpointError: a file is missing, cut short, corrupt or a pickle, or the folder holds no single model.
    """
    index = _index_of(path)
    if index is not None:
        return _read_shards(index)
    if os.path.isdir(path):
        path = _only_file(path)
    return read_gguf(path) if is_gguf(path) else _read_safetensors(path)


def is_gguf(path: str) -> bool:
    """Whether a file is read as GGUF: its name ends in .gguf."""
    return path.lower().endswith(".gguf")


def is_index(path: str) -> bool:
    """Whether a file is an index, which lists the shards of a model."""
    return path.endswith(_INDEX)


def is_shard(path: str) -> bool:
    """Whether a file is a shard, one of several files that hold a model."""
    return _SHARD.fullmatch(os.path.basename(path)) is not None


def model_files(path: str) -> list[str]:
    """The files that `path` stands for: the file itself, or the existing files of a folder or of a shard's model."""
    index = _index_of(path)
    folder = os.path.dirname(index) if index else path
    if not os.path.isdir(folder):
        return [path]
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if ".safetensors" in name)


def _index_of(path: str) -> str | None:
    """The path of the index in the folder `path`, or of the index that lists the shard `path`; None without one."""
    if os.path.isdir(path):
        indices = sorted(name for name in os.listdir(path) if is_index(name))
        return os.path.join(path, min(indices, key=len)) if indices else None  # others are variants such as .fp16
    shard = _SHARD.fullmatch(os.path.basename(path))
    index = os.path.join(os.path.dirname(path), shard[1] + _INDEX) if shard else ""
    return index if os.path.isfile(index) else None


def _only_file(folder: str) -> str:
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    if len(files) != 1:
        raise CheckpointError(
            f"The folder {Path(folder).name} holds {len(files)} .safetensors files and no index of them. Choose a "
            "folder with one model, such as the transformer folder of a diffusers model."
        )
    return os.path.join(folder, files[0])


def _read_shards(index: str) -> FileHeader:
    folder, name = os.path.dirname(index), Path(index).name
    try:
        places = json.loads(Path(index).read_bytes())["weight_map"]
        shards = sorted(set(places.values()))
        valid = all(isinstance(shard, str) and Path(shard).name == shard for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise CheckpointError(f"The index {name} is corrupt. Download it again.")
    missing = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
    if missing:
        raise CheckpointError(
            f"{Path(folder).name} lacks {len(missing)} of the {len(shards)} files in {name}: {listed(missing)}. "
            "Download them into the same folder."
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        file_header = _read_safetensors(os.path.join(folder, shard))
        tensors |= file_header.tensors
        metadata |= file_header.metadata
    return FileHeader(tensors, metadata)


def _read_safetensors(path: str) -> FileHeader:
    name = Path(path).name
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(9)  # of a safetensors file: the length of its header, and the header's "{"
            _refuse_other_containers(name, start)
            length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else _MAX_HEADER_BYTES + 1
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{name} is not a safetensors file, or its download stopped early. Download it again."
                )
            file.seek(8)
            entries = json.loads(file.read(length))
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # the latter from deep nesting
        raise CheckpointError(f"The header of {name} is corrupt. Download the file again.") from error
    return _checked_entries(path, entries, 8 + length, size)


def _checked_entries(path: str, entries: object, start: int, size: int) -> FileHeader:
    name = Path(path).name
    corrupt = CheckpointError(f"The header of {name} is corrupt. Download the file again.")
    if not isinstance(entries, dict):
        raise corrupt
    metadata = entries.pop("__metadata__", {})
    tensors, end = {}, 0
    for key, info in entries.items():
        try:
            dtype, shape, (begin, stop) = info["dtype"], info["shape"], info["data_offsets"]
            valid = isinstance(dtype, str) and 0 <= begin <= stop and all(int(n) >= 0 for n in shape)
        except (TypeError, KeyError, ValueError, OverflowError):
            raise corrupt from None
        if not valid:
            raise corrupt
        if dtype in _ITEM_BYTES and stop - begin != elements(shape) * _ITEM_BYTES[dtype]:
            raise corrupt
        tensors[key] = TensorInfo(dtype, tuple(shape), path, key, start + begin, stop - begin)
        end = max(end, stop)
    if end > size - start:
        raise CheckpointError(
            f"{name} is cut short: {size - start:,} of {end:,} bytes of weights are there. Download it again."
        )
    return FileHeader(tensors, metadata if isinstance(metadata, dict) else {})


def _refuse_other_containers(name: str, start: bytes) -> None:
    # The length of a safetensors header can begin with either magic number as well.
    pickled = start[8:] != b"{" and start.startswith((b"PK", b"\x80"))
    if pickled or Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise CheckpointError(
            f"{name} is a pickle file, which can run code when it is opened. Use its .safetensors version."
        )
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{name} is a GGUF file under another name. Rename it, so that it ends in .gguf.")
