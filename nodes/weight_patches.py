"""ComfyUI's weight patches (LoRAs of any kind) in the form that the workers merge.

A plain LoRA travels as its two thin matrices. Whatever else ComfyUI can apply (LoHa, LoKr, DoRA, OFT, LoCon
with a middle matrix, ...) is computed by ComfyUI itself, on the weight as the file has it, and travels as the
result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ..distributed.messages import ModelSpec
from ..wanvideo.checkpoint import DTYPES, WEIGHT_DTYPES, Checkpoint, held_dtype
from ..wanvideo.lora import Difference, LowRank, Replacement, WeightPatch
from ..wanvideo.quantized import as_tensor
from .refusals import refuse, refuse_merging

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."

# An entry of ModelPatcher.patches: (strength, what, strength of the weight itself, offset, function)
Entry = tuple[float, Any, float, Any, Any]


def refuse_foreign(patch: object) -> None:
    """Refuse the patches of model merging, which bring the weights of another model.

    Raises:
        NotOnWorkers: `patch` is one of them.
    """
    if isinstance(patch, list) or (isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "model_as_lora"):
        refuse_merging()


def for_workers(patches: Mapping[str, Sequence[Entry]], spec: ModelSpec) -> dict[str, list[WeightPatch]]:
    """Translate `ModelPatcher.patches` for the model that the workers hold by `spec`.

    Returns:
        Patches by weight name without prefix, in the order in which they apply.

    Raises:
        NotOnWorkers: a patch changes the shape of a weight.
    """
    checkpoint = Checkpoint(spec.path, spec.vace)
    translated = {}
    for key, entries in patches.items():
        comfy.model_management.throw_exception_if_processing_interrupted()  # a LoHa of 14B takes a while
        name = key.removeprefix(PREFIX)
        shape = checkpoint.header.tensors[name].shape
        plain = [_plain(entry, name, shape) for entry in entries]
        if None in plain:
            weight = as_tensor(checkpoint.tensor(name), torch.float32)
            dtype = held_dtype(weight.ndim, WEIGHT_DTYPES[spec.weight_dtype])
            translated[name] = [_computed(entries, weight, key, dtype)]
        else:
            translated[name] = [patch for alternatives in plain for patch in alternatives]
    return {name: changes for name, changes in translated.items() if changes}


def _plain(entry: Entry, name: str, shape: tuple[int, ...]) -> list[WeightPatch] | None:
    """The entry as at most one patch of ours; None if only ComfyUI can compute it."""
    strength, patch, base_scale, offset, function = entry
    if offset is not None or function is not None:
        return None
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, middle, dora, reshape = patch.weights
        if middle is not None or dora is not None or reshape is not None:
            return None
        if up.shape[0] * down.flatten(1).shape[1] != torch.Size(shape).numel():
            return _does_not_fit(name, (up.shape[0], down.flatten(1).shape[1]), shape)
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        return [LowRank(_sendable(up), _sendable(down), scale, base_scale)]
    if isinstance(patch, WeightAdapterBase):
        return None
    kind, values = patch if len(patch) == 2 else ("diff", patch)
    if kind not in ("diff", "set") or len(values) != 1:
        return None
    if tuple(values[0].shape) != tuple(shape):
        return _does_not_fit(name, values[0].shape, shape)
    if kind == "set":
        return [Replacement(_sendable(values[0]))]
    return [Difference(_sendable(values[0]), strength, base_scale)]


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that travels; the merge is in float32 in any case."""
    return tensor if tensor.dtype in DTYPES.values() else tensor.to(torch.float32)


def _does_not_fit(name: str, got: Sequence[int], shape: Sequence[int]) -> list[WeightPatch]:
    """ComfyUI leaves such a tensor out and says so in its log; the rest of the LoRA applies."""
    log.warning(
        "A LoRA tensor of shape %s does not fit %s of shape %s, and is left out, as ComfyUI does.",
        tuple(got),
        name,
        tuple(shape),
    )
    return []


def _computed(entries: Sequence[Entry], weight: torch.Tensor, key: str, dtype: torch.dtype) -> Replacement:
    """The weight after all of its entries, computed by ComfyUI in float32; it travels in `dtype`."""
    result = comfy.lora.calculate_weight(list(entries), weight.to(torch.float32, copy=True), key)
    if result.shape != weight.shape:
        refuse(
            f"A LoRA changes the shape of {key} from {tuple(weight.shape)} to {tuple(result.shape)}",
            "Use a LoRA made for a model of this variant.",
        )
    return Replacement(result.to(dtype))
