"""Reads the headers of a model's files: the names, types, shapes and positions of the tensors, and the metadata.

A model is one safetensors or GGUF file, or a folder of safetensors files (shards) with an index, as diffusers and
Wan's authors publish it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..base.regular_file import FileIdentity, open_regular, stamp_of
from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, listed, unreadable
from .gguf_header import read_gguf
from .safetensors_header import MAX_TENSORS, read_safetensors

_MAX_INDEX_BYTES = 10_000_000
_MAX_SHARDS = 1_000
_NAME_OF_FILE = re.compile(r"[^/\\\0]+\.safetensors")
"""The name of a shard, which lies beside its index."""
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
    return read_gguf(path) if is_gguf(path) else read_safetensors(path)


def is_gguf(path: str) -> bool:
    """Whether a file is read as GGUF: its name ends in .gguf."""
    return path.lower().endswith(".gguf")


def is_index(path: str) -> bool:
    """Whether a file is an index, which lists the shards of a model."""
    return path.endswith(_INDEX)


def is_shard(path: str) -> bool:
    """Whether a file is a shard, one of several files that hold a model."""
    return _SHARD.fullmatch(os.path.basename(path)) is not None


def _index_of(path: str) -> str | None:
    """The path of the index in the folder `path`, or of the index that lists the shard `path`; None without one."""
    if os.path.isdir(path):
        indices = [name for name in _names_in(path) if is_index(name)]
        return os.path.join(path, min(indices, key=len)) if indices else None  # others are variants such as .fp16
    shard = _SHARD.fullmatch(os.path.basename(path))
    index = os.path.join(os.path.dirname(path), shard[1] + _INDEX) if shard else ""
    return index if os.path.isfile(index) else None


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _only_file(folder: str) -> str:
    files = [name for name in _names_in(folder) if name.endswith(".safetensors")]
    if len(files) != 1:
        raise CheckpointError(
            f"The folder {Path(folder).name} holds {len(files)} .safetensors files and no index of them. Choose a "
            "folder with one model, such as the transformer folder of a diffusers model."
        )
    return os.path.join(folder, files[0])


def _read_shards(index: str) -> FileHeader:
    folder, name = os.path.dirname(index), Path(index).name
    places, identity, stamp = _read_index(index)
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
    if missing:
        raise CheckpointError(
            f"{Path(folder).name} lacks {len(missing)} of the {len(shards)} files in {name}: {listed(missing)}. "
            "Download them into the same folder."
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    identities, stamps = {index: identity}, [stamp]
    for shard in shards:
        found = read_safetensors(os.path.join(folder, shard))
        tensors |= {key: info for key, info in found.tensors.items() if places.get(key, shard) == shard}
        metadata |= found.metadata
        identities |= found.identities
        stamps.append(found.stamp)
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{Path(folder).name} has more tensors than any model. Choose another folder.")
    lost = [key for key in places if key not in tensors]
    if lost:
        raise CheckpointError(
            f"{Path(folder).name} lacks {len(lost)} of the tensors in {name}: {listed(lost)}. Download its files "
            "again, all from the same place."
        )
    return FileHeader(tensors, metadata, identities, stamp_of(identity, "".join(stamps).encode()))


def _read_index(index: str) -> tuple[dict[str, str], FileIdentity, str]:
    """The shard of each tensor by the names in an index, and the identity and the stamp of the index."""
    name = Path(index).name
    corrupt = CheckpointError(f"The index {name} is corrupt. Download it again.")
    with open_regular(index) as file:
        identity = FileIdentity.of(file)
        if identity.size > _MAX_INDEX_BYTES:
            raise corrupt
        try:
            raw = file.read(_MAX_INDEX_BYTES)
            places = json.loads(raw)["weight_map"]
            valid = 0 < len(places) <= MAX_TENSORS and len(set(places.values())) <= _MAX_SHARDS
            valid = valid and all(_NAME_OF_FILE.fullmatch(shard) for shard in places.values())
        except OSError as error:
            raise unreadable(index, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise corrupt from None
    if not valid:
        raise corrupt
    return places, identity, stamp_of(identity, raw)
