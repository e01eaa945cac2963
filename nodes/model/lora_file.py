"""The tensors of a LoRA file, checked before ComfyUI computes with them. Imports no ComfyUI."""

from __future__ import annotations

from pathlib import Path

import torch

from ...wanvideo.base.tensor_info import FLOATS, CheckpointError, elements, shortened
from ...wanvideo.checkpoint.mapped_file import MappedFile
from ...wanvideo.checkpoint.safetensors_header import read_safetensors

_TYPES = (*FLOATS, "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8")
"""The types of tensors that torch can convert to float."""


def read_lora(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a LoRA file, memory-mapped.

    Raises:
        CheckpointError: the file is damaged or no safetensors file, or holds a tensor that no LoRA has.
    """
    header = read_safetensors(path)
    for name, info in header.tensors.items():
        numbers = elements(info.shape)
        if info.dtype not in _TYPES or not numbers or (name.endswith(".alpha") and numbers != 1):
            raise CheckpointError(
                f"{Path(path).name} is no LoRA or damaged: its tensor {shortened(name)} is {shortened(info.dtype)} of "
                f"shape {list(info.shape)[:8]}. Download it again, or choose another LoRA."
            )
    file = MappedFile(path, False, header.identities[path])
    return {name: file.tensor(info) for name, info in header.tensors.items()}
