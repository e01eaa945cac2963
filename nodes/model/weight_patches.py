"""ComfyUI's weight patches (LoRAs of any kind) in the form that the workers merge.

A plain LoRA travels as its two thin matrices. ComfyUI itself computes every other kind of patch (LoHa, LoKr, DoRA, OFT,
LoCon with a middle matrix, ...) on the weight as the file has it; the resulting weight travels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ...distributed.protocol.specs import ModelSpec
from ...wanvideo.base.lora import Difference, LoraDelta, LowRank, Replacement
from ...wanvideo.base.tensor_info import TensorInfo, listed
from ...wanvideo.checkpoint.weight_source import DTYPES, WEIGHT_DTYPES, Checkpoint, storage_dtype
from ...wanvideo.quant.quantized import as_tensor
from ..common.refusals import refuse, refuse_merging

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."

# An entry of ModelPatcher.patches: (strength, what, strength of the weight itself, offset, function)
Entry = tuple[float, Any, float, Any, Any]


def refuse_foreign(patch: object) -> None:
    """Refuse the patches of model merging, which bring the weights of another model.

    Raises:
        NotOnWorkers: `patch` is of this kind.
    """
    if isinstance(patch, list) or (isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "model_as_lora"):
        refuse_merging()


def for_workers(patches: Mapping[str, Sequence[Entry]], spec: ModelSpec) -> dict[str, list[LoraDelta]]:
    """Translate `ModelPatcher.patches` for the model that the workers have loaded as `spec`.

    Returns:
        Patches by weight name without prefix, in the order in which they apply.

    Raises:
        NotOnWorkers: a patch changes the shape of a weight.
    """
    checkpoint = Checkpoint(spec.path, spec.module, spec.stamp)
    translated: dict[str, list[LoraDelta]] = {}
    left_out = []
    for key, entries in patches.items():
        comfy.model_management.throw_exception_if_processing_interrupted()  # a LoHa of 14B takes a while
        name = key.removeprefix(PREFIX)
        if not is_patchable(name):
            left_out.append(name)
            continue
        shape = checkpoint.header.tensors[name].shape
        translated[name] = _translated([entry for entry in entries if fits(entry[1], shape)], key, checkpoint, spec)
    if left_out:
        log.info("ComfyUI applies no LoRA to %s, so these workers do not either.", listed(left_out))
    return {name: changes for name, changes in translated.items() if changes}


def _translated(entries: Sequence[Entry], key: str, checkpoint: Checkpoint, spec: ModelSpec) -> list[LoraDelta]:
    """The patches of one weight for the workers. Where only ComfyUI can compute a patch, the one `Replacement` is the
    weight after all patches."""
    plain = [patch for entry in entries if (patch := _plain(entry)) is not None]
    if len(plain) == len(entries):
        return plain
    name = key.removeprefix(PREFIX)
    weight = as_tensor(checkpoint.tensor(name), torch.float32)
    dtype = storage_dtype(name, weight.ndim, WEIGHT_DTYPES[spec.weight_dtype])
    return [_computed(entries, weight, key, dtype)]


def is_patchable(name: str) -> bool:
    """Whether ComfyUI applies patches to the weight `name`.

    ComfyUI passes over the parameters of modules that hold other modules: the modulation of the blocks and of the head,
    and the positions of the image tokens.
    """
    return name.endswith((".weight", ".bias"))


def check_fit(patches: Mapping[Any, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Log how much of a LoRA fits the model's `tensors`, unless all of it fits.

    Args:
        patches: the argument of `ModelPatcher.add_patches`. The offset that a key may have is ignored.

    Raises:
        NotOnWorkers: no patch fits.
    """
    touched = {key.removeprefix(PREFIX): patch for key, patch in patches.items() if isinstance(key, str)}
    touched = {name: patch for name, patch in touched.items() if name in tensors}
    misfits = [name for name, patch in touched.items() if not fits(patch, tensors[name].shape)]
    if len(misfits) == len(touched) and not any(isinstance(key, tuple) for key in patches):
        counts = f"of the {len(tensors)} weights of this model"
        what = (
            f"A LoRA has tensors for {len(touched)} {counts}, and none has its weight's shape ({listed(misfits)})"
            if touched
            else f"A LoRA has tensors for none {counts}"
        )
        refuse(
            what,
            "Use one made for this kind and size of Wan; names as diffusers and peft write them are read by the lora "
            "input of XDit+USP WanVideo Model Loader.",
        )
    if misfits:
        log.warning(
            "A LoRA fits %d of the %d weights that it has tensors for. Left out, as ComfyUI does: %s.",
            len(touched) - len(misfits),
            len(touched),
            listed(misfits),
        )


def fits(patch: Any, shape: Sequence[int]) -> bool:
    """Whether a patch has the `shape` of its weight; True for a patch whose shape only its computation would show."""
    if isinstance(patch, LoRAAdapter):
        up, down, _, middle, _, reshape = patch.weights
        told = middle is None and reshape is None
        return not told or _product_size(up, down) == torch.Size(shape).numel()
    if isinstance(patch, WeightAdapterBase):
        return True
    kind, values = _kind_of(patch)
    return kind not in ("diff", "set") or len(values) != 1 or tuple(values[0].shape) == tuple(shape)


def _product_size(up: torch.Tensor, down: torch.Tensor) -> int:
    """How many numbers the product of the matrices of a LoRA has; 0 where they are no matrices, or do not fit."""
    if up.ndim < 2 or down.ndim < 2 or up.flatten(1).shape[1] != down.shape[0]:
        return 0
    return up.shape[0] * down.flatten(1).shape[1]


def _kind_of(patch: tuple) -> tuple[str, tuple]:
    return patch if len(patch) == 2 else ("diff", patch)


def _plain(entry: Entry) -> LoraDelta | None:
    """The entry as a patch that the workers merge; None where only ComfyUI can compute it."""
    strength, patch, base_scale, offset, function = entry
    if offset is not None or function is not None:
        return None
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, middle, dora, reshape = patch.weights
        if middle is not None or dora is not None or reshape is not None:
            return None
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        return LowRank(_sendable(up), _sendable(down), scale, base_scale)
    if isinstance(patch, WeightAdapterBase):
        return None
    kind, values = _kind_of(patch)
    if kind not in ("diff", "set") or len(values) != 1:
        return None
    if kind == "set":
        return Replacement(_sendable(values[0]))
    return Difference(_sendable(values[0]), strength, base_scale)


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to a dtype that travels; the merge is in float32 in any case."""
    return tensor if tensor.dtype in DTYPES.values() else tensor.to(torch.float32)


def _computed(entries: Sequence[Entry], weight: torch.Tensor, key: str, dtype: torch.dtype) -> Replacement:
    """The weight after all of its entries, computed by ComfyUI in float32; it travels in `dtype`."""
    result = comfy.lora.calculate_weight(list(entries), weight.to(torch.float32, copy=True), key)
    if result.shape != weight.shape:
        refuse(
            f"A LoRA changes the shape of {key} from {tuple(weight.shape)} to {tuple(result.shape)}",
            "Use a LoRA made for a model of this variant.",
        )
    return Replacement(result.to(dtype))
