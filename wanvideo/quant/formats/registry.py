"""From what a file holds to the weights of the model: scales find their matrices, and formats get their names.

Known are float tensors; fp8 without scales; ComfyUI's scaled fp8, both the older (`scaled_fp8`, `X.scale_weight`,
`X.scale_input`) and the newer kind (`X.comfy_quant` or the metadata `_quantization_metadata`, `X.weight_scale`,
`X.input_scale`), which kijai's files resemble; ComfyUI's int8, rotated (ConvRot) or not, its NVFP4 (with
`X.weight_scale_2`) and MXFP8; the blocks of GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..base.tensor_info import CheckpointError, Contents, TensorInfo, elements
from .block_scaled import GROUPS, BlockScaledWeight, scales_in_file
from .gguf_blocks import BLOCKS, GgufWeight
from .quantized import Fp8Weight, Int8Weight, QuantizedWeight, Weight, scale_of

FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".weight_scale", ".scale_weight")
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")  # inputs are not rounded here
_WHOLE_SCALE, _SMOOTHING = ".weight_scale_2", ".pre_quant_scale"
_DESCRIBING = (*_SCALES, *_UNUSED, _WHOLE_SCALE, _SMOOTHING)
_BLOCK_SCALED = {"nvfp4": "U8", "mxfp8": "F8_E4M3"}  # what their numbers are stored as
_BYTES = ("U8", "F8_E4M3", "F8_E8M0")  # what their scales are
_KNOWN = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_LARGEST_NOTE = 4096  # bytes of a layer's comfy_quant
_METADATA = "_quantization_metadata"


def logical_tensors(path: str, contents: Contents, prefix: str = "") -> dict[str, TensorInfo]:
    """The tensors of a file whose names begin with `prefix`, without those that only describe others, which the others
    carry with them.

    Raises:
        CheckpointError: the file has weights in a format without code here.
    """
    notes = _notes(path, contents)
    tensors = contents.tensors
    logical = {}
    for name, info in tensors.items():
        if not name.startswith(prefix) or name.endswith(_DESCRIBING) or name == f"{prefix}scaled_fp8":
            continue
        layer = name.removesuffix(".weight")
        note = notes.get(layer, {}) if layer != name else {}
        scale = next((tensors[layer + end] for end in _SCALES if layer != name and layer + end in tensors), None)
        kind = str(note.get("format"))
        if kind in _BLOCK_SCALED and layer + _SMOOTHING not in tensors:
            logical[name] = _block_scaled(path, name, info, scale, tensors.get(layer + _WHOLE_SCALE), kind)
        else:
            logical[name] = _described(path, name, info, scale, note)
    return logical


def weight_of(
    info: TensorInfo, data: torch.Tensor, scale: torch.Tensor | None, whole_scale: torch.Tensor | None = None
) -> Weight:
    """A weight from the tensors of its file: quantised if it is a matrix that the file has quantised.

    `data` is the tensor as stored; of a GGUF block format, uint8 [rows, bytes].
    """
    if info.dtype in GROUPS:
        return BlockScaledWeight.of_file(info.dtype, data, scale, whole_scale)
    if info.dtype in BLOCKS:
        weight: QuantizedWeight = GgufWeight(info.dtype, data.view(-1, data.shape[-1]), info.shape[-1])
    elif info.dtype == "I8":
        weight = Int8Weight(data, scale_of(scale, len(data)), info.rotation)
    elif info.dtype in _FP8:
        flat = data.view(len(data), -1) if data.ndim > 1 else data.view(1, -1)
        weight = Fp8Weight(flat, scale_of(scale, len(flat)))
    else:
        return data
    return weight if len(info.shape) == 2 else weight.dequantize(torch.float32).view(info.shape)


def format_name(tensors: Mapping[str, TensorInfo]) -> str:
    """What a user calls the format of most of the weights, such as scaled fp8 e4m3 or GGUF Q4_K."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        name = _name(info)
        sizes[name] = sizes.get(name, 0) + elements(info.shape)
    return max(sizes, key=sizes.__getitem__)


def is_quantized(info: TensorInfo) -> bool:
    """Whether the model holds this tensor as the file has it (see `weight_of`)."""
    return info.dtype not in FLOATS and len(info.shape) == 2


def quantized_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor that `is_quantized`, without what is as small as a scale for each row."""
    return info.nbytes + (elements(info.shape) // GROUPS[info.dtype].numbers if info.dtype in GROUPS else 0)


def _name(info: TensorInfo) -> str:
    if info.dtype in GROUPS:
        return info.dtype.lower()
    if info.dtype in BLOCKS:
        return f"GGUF {info.dtype}"
    if info.dtype == "I8":
        return "int8 convrot" if info.rotation else "int8"
    if info.dtype in _FP8:
        return ("scaled " if info.scale else "") + ("fp8 e4m3" if info.dtype == "F8_E4M3" else "fp8 e5m2")
    return {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(info.dtype, info.dtype)


def _described(path: str, name: str, info: TensorInfo, scale: TensorInfo | None, note: Mapping) -> TensorInfo:
    kind = note.get("format")
    if kind is not None and kind not in _KNOWN:
        raise _unknown(path, str(kind))
    if info.dtype == "I8" and kind == "int8_tensorwise" and scale is not None:
        options = {**_mapping(note.get("params")), **note}
        rotation = options.get("convrot_groupsize", 256) if options.get("convrot") else 0
        _check_rotation(path, name, info, rotation)
        _check_scale(path, name, info, scale)
        return replace(info, scale=scale, rotation=rotation)
    if info.dtype in _FP8:
        if scale is not None:
            _check_scale(path, name, info, scale)
        return replace(info, scale=scale)
    if info.dtype in FLOATS or info.dtype in BLOCKS:
        return info
    raise _unknown(path, str(kind or info.dtype))


def _block_scaled(
    path: str, name: str, info: TensorInfo, scale: TensorInfo | None, whole: TensorInfo | None, kind: str
) -> TensorInfo:
    """A matrix in NVFP4 or MXFP8."""
    group, whole = GROUPS[kind.upper()], whole if kind == "nvfp4" else None
    rows, width = info.shape if len(info.shape) == 2 else (0, 1)
    scales = elements(scale.shape) if scale is not None and scale.dtype in _BYTES else 0
    one = whole is not None and whole.dtype in FLOATS and elements(whole.shape) == 1
    fits = info.dtype == _BLOCK_SCALED[kind] and width % group.nbytes == 0 and (one or kind != "nvfp4")
    if not fits or scales != scales_in_file(rows, width // group.nbytes):
        raise CheckpointError(
            f"{Path(path).name} has {name} in {kind}, of which a scale is missing or of another size. "
            "Download it again, or use the fp8_scaled, GGUF or bf16 version of the model."
        )
    shape = rows, width // group.nbytes * group.numbers
    return replace(info, dtype=kind.upper(), shape=shape, scale=scale, whole_scale=whole)


def _check_scale(path: str, name: str, info: TensorInfo, scale: TensorInfo) -> None:
    rows = info.shape[0] if len(info.shape) > 1 else 1
    if scale.dtype not in FLOATS or elements(scale.shape) not in (1, rows):
        raise CheckpointError(
            f"{Path(path).name} has a scale of shape {list(scale.shape)} ({scale.dtype}) for {name} of shape "
            f"{list(info.shape)}, which this version cannot read. Use the fp8_scaled or bf16 version of the model."
        )


def _check_rotation(path: str, name: str, info: TensorInfo, size: object) -> None:
    powers = (0, 4, 16, 64, 256, 1024)
    if size not in powers or len(info.shape) != 2 or (size and info.shape[1] % size):
        raise CheckpointError(
            f"{Path(path).name} has {name} rotated in groups of {size} columns, which this version cannot undo. "
            "Use the fp8_scaled or bf16 version of the model."
        )


def _unknown(path: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{Path(path).name} has {kind} weights, which this version cannot read. "
        "Use the fp8_scaled, GGUF, bf16 or fp16 version of the model."
    )


def _notes(path: str, contents: Contents) -> dict[str, Mapping]:
    """What the file says about its quantised layers, by their names there."""
    notes = {}
    try:
        if _METADATA in contents.metadata:
            for layer, note in json.loads(contents.metadata[_METADATA])["layers"].items():
                notes[layer] = {"format": note} if isinstance(note, str) else _mapping(note)
        for name, info in contents.tensors.items():
            if name.endswith(".comfy_quant") and info.nbytes <= _LARGEST_NOTE:
                notes[name.removesuffix(".comfy_quant")] = _mapping(json.loads(_bytes(info)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"What {Path(path).name} says about its quantised layers is corrupt. Download it again."
        ) from None
    return notes


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, dict) else {}


def _bytes(info: TensorInfo) -> bytes:
    with open(info.file, "rb") as file:
        file.seek(info.offset)
        return file.read(info.nbytes)
