"""VACE as a module: a file with the VACE blocks alone, which a text-to-video model of the same size takes in.

Published for kijai's wrapper (`Wan2_1-VACE_module_14B_bf16.safetensors` and others) and as GGUF: the tensors
`vace_blocks.*` and `vace_patch_embedding.*` of a VACE model. Both files together are that model. Each keeps its format.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..base.config import PRESETS
from ..base.tensor_info import CheckpointError, FileHeader, listed
from ..base.variant import TensorShapes, read_variants
from ..quant.format import LogicalTensor
from ..quant.formats.registry import logical_tensors
from .file_header import read_file_header
from .header import PREFIXES, Header, read_header
from .infinitetalk_module import is_infinitetalk, with_infinitetalk

_MARKER = "vace_blocks.0.after_proj.weight"
_PARTS = ("vace_blocks.", "vace_patch_embedding.")


def read_model(path: str | os.PathLike[str], module: str = "") -> Header:
    """Read the header of the model at `path`, joined with `module`, the file of a VACE module or InfiniteTalk's layers.

    Raises:
        CheckpointError: see `read_header`, `with_module` and `with_infinitetalk`.
    """
    header = read_header(path)
    if not module:
        return header
    file_header = read_file_header(module)
    joined = with_infinitetalk if is_infinitetalk(file_header) else with_module
    return joined(header, module, file_header)


def read_module(path: str) -> dict[str, LogicalTensor]:
    """The tensors of a VACE module by their original names, from the header alone.

    Raises:
        CheckpointError: the file is missing, damaged, or no VACE module.
    """
    return _module_tensors(path, read_file_header(path))


def _module_tensors(path: str, file_header: FileHeader) -> dict[str, LogicalTensor]:
    name, raw = Path(path).name, file_header.tensors
    prefix = next((p for p in PREFIXES if p + _MARKER in raw), None)
    if prefix is None:
        raise CheckpointError(
            f"{name} is no VACE module: it has no tensor {_MARKER}. "
            "Choose a file such as Wan2_1-VACE_module_14B_bf16.safetensors."
        )
    if f"{prefix}head.modulation" in raw:
        raise CheckpointError(
            f"{name} is a whole VACE model, not a module. Choose it as model, and disconnect vace_model."
        )
    return {key.removeprefix(prefix): info for key, info in logical_tensors(path, file_header, prefix).items()}


def with_module(base: Header, path: str, file_header: FileHeader) -> Header:
    """Join the model `base` and the VACE module in the file `path`, which has this header, to one model.

    Raises:
        CheckpointError: the base is no text-to-video model, or the file is no module or made for another size.
    """
    module = _module_tensors(path, file_header)
    name, base_name = Path(path).name, Path(base.path).name
    if base.config.variant != "text-to-video" or base.is_flow_rvs:
        kind = "a FlowRVS" if base.is_flow_rvs else f"an {base.config.variant}"
        has = "has VACE blocks already" if base.config.variant == "VACE" else f"is {kind} model"
        raise CheckpointError(
            f"{base_name} {has}, and the VACE module {name} belongs to a text-to-video model. "
            "Disconnect vace_model, or choose a text-to-video model."
        )
    width = module[_MARKER].shape[0]
    if width != base.config.dim:
        raise CheckpointError(
            f"{name} is made for a model of {_size(width)}, but {base_name} is one of {_size(base.config.dim)}. "
            "Use the module of the same size."
        )
    shapes = TensorShapes(name, module)
    config, blocks = base.config.having(*read_variants(shapes)), shapes.blocks("vace_blocks")
    expected = {key: shape for key, shape in config.shapes().items() if key.startswith(_PARTS)}
    wrong = [key for key, shape in expected.items() if key not in module or module[key].shape != shape]
    wrong += [key for key in module if key not in expected]
    if wrong or not all(variant.divides(config) for variant in config.variants):
        raise CheckpointError(
            f"{name} does not fit {base_name}: {blocks} VACE blocks beside {config.num_layers} layers, and "
            f"{len(wrong)} tensors are missing, unknown or of another shape: {listed(wrong)}. "
            "Download it again, or use the module made for this model."
        )
    return base.joined(config, module, file_header)


def _size(width: int) -> str:
    names = {config.dim: name.upper() for name, config in PRESETS.items()}
    return f"width {width} ({names[width]})" if width in names else f"width {width}"
