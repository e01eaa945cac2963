"""Finds the format of every tensor in a file, by asking each registered format (see format.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...base.regular_file import open_regular
from ...base.tensor_info import CheckpointError, FileHeader, TensorInfo, elements, shortened
from ..format import FORMATS, Format, LogicalTensor, StoredTensor

_NOTE = ".comfy_quant"
"""End of the name of a tensor with ComfyUI's note about a layer, in JSON."""
_LARGEST_NOTE = 4096  # bytes
MAX_NOTE = 2**22
"""Letters of a note about a whole file; a note about each layer of a 14B model has 30,000."""
_METADATA = "_quantization_metadata"
"""The key of the metadata under which newer files have the notes of all layers, in JSON."""


def logical_tensors(path: str, file_header: FileHeader, prefix: str = "") -> dict[str, LogicalTensor]:
    """The tensors of a file whose names begin with `prefix`, each with its format and the shape of the float tensor
    that it stands for. Tensors that only describe other tensors are left out, as those tensors' formats hold them.

    Raises:
        CheckpointError: the file has weights in a format without code here, or is damaged.
    """
    notes, tensors = _notes(path, file_header), file_header.tensors
    ends = tuple(dict.fromkeys(end for kind in FORMATS for end in kind.companions))
    markers = {prefix + marker for kind in FORMATS for marker in kind.markers}
    logical = {}
    for name, info in tensors.items():
        if not name.startswith(prefix) or name.endswith((*ends, _NOTE)) or name in markers:
            continue
        layer = name.removesuffix(".weight")
        if layer == name:
            stored = StoredTensor(path, name, info, {}, {})
        else:
            companions = {end: tensors[layer + end] for end in ends if layer + end in tensors}
            stored = StoredTensor(path, name, info, companions, notes.get(layer, {}))
        format = _recognised(stored)
        shape = format.logical_shape(info)
        logical[name] = LogicalTensor(info.dtype, shape, info.file, info.key, info.offset, info.nbytes, format)
    return logical


def format_name(tensors: Mapping[str, LogicalTensor]) -> str:
    """The user's name for the format of most of the weights, such as scaled fp8 e4m3 or GGUF Q4_K."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.format.name] = sizes.get(info.format.name, 0) + elements(info.shape)
    return max(sizes, key=sizes.__getitem__)


def is_gguf_type(name: str) -> bool:
    """Whether a format reads GGUF tensors of the type that GGUF calls `name`."""
    return any(name in kind.gguf_types for kind in FORMATS)


def _recognised(stored: StoredTensor) -> Format:
    for kind in FORMATS:
        format = kind.recognise(stored)
        if format is not None:
            return format
    noted = stored.noted_format
    raise CheckpointError(
        f"{stored.file_name} has {stored.info.dtype if noted is None else shortened(str(noted))} weights, which this "
        "version cannot read. Use the fp8_scaled, GGUF, bf16 or fp16 version of the model."
    )


def _notes(path: str, file_header: FileHeader) -> dict[str, Mapping[str, object]]:
    """ComfyUI's notes about quantised layers, by the names of the layers in the file."""
    notes: dict[str, Mapping[str, object]] = {}
    try:
        if _METADATA in file_header.metadata:
            text = file_header.metadata[_METADATA]
            if len(text) > MAX_NOTE:
                raise ValueError
            for layer, note in json.loads(text)["layers"].items():
                notes[layer] = {"format": note} if isinstance(note, str) else _mapping(note)
        for name, info in file_header.tensors.items():
            if name.endswith(_NOTE) and info.nbytes <= _LARGEST_NOTE:
                notes[name.removesuffix(_NOTE)] = _mapping(json.loads(_bytes(info)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"What {Path(path).name} says about its quantised layers is corrupt. Download it again."
        ) from None
    return notes


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _bytes(info: TensorInfo) -> bytes:
    with open_regular(info.file) as file:
        file.seek(info.offset)
        return file.read(info.nbytes)
