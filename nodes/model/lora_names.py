"""The names of LoRA files for the loader's own `lora` input, and whether a LoRA belongs to the model at all.

LoraLoaderModelOnly knows ComfyUI's names, kohya's and VideoX-Fun's. Training scripts write other names as well:
diffusers' (`transformer.blocks.0.attn1.to_q`), peft's (`base_model.model.`), DiffSynth's (`pipe.dit.`), LyCORIS'
(`lycoris_`), or names without a prefix. The ending behind the name of the module (`lora_A.weight`, `alpha`, `diff_b`,
...) is passed on as it is, for ComfyUI to interpret.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TypeVar

from ...wanvideo.base.tensor_info import listed
from ...wanvideo.base.user_error import InputError
from ...wanvideo.checkpoint.diffusers_names import diffusers_name

log = logging.getLogger(__name__)

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "unet.")
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
NATIVE = "diffusion_model."
Value = TypeVar("Value")


def with_native_names(name: str, lora: Mapping[str, Value], weights: Iterable[str]) -> dict[str, Value]:
    """Return the tensors of the LoRA file `name` that belong to a model with these `weights`, under ComfyUI's names.

    Raises:
        InputError: no tensor belongs to the model.
    """
    modules = _modules(weights)
    found = {key: native for key in lora if (native := _native(key, modules)) is not None}
    strangers = [key for key in lora if key not in found]
    if not found:
        raise InputError(
            f"LoRA {name} is for another model: none of its {len(lora)} tensors belongs to this one "
            f"({listed(strangers)}). Choose a LoRA that was made for Wan."
        )
    if strangers:
        log.warning(
            "LoRA %s: %d of %d tensors belong to this model. Left out: %s.",
            name,
            len(found),
            len(lora),
            listed(strangers),
        )
    return {native: lora[key] for key, native in found.items()}


def _modules(weights: Iterable[str]) -> dict[str, str]:
    """The original name of every module, by all names that LoRA files have for it."""
    modules: dict[str, str] = {}
    for weight in weights:
        original = weight.removesuffix(".weight").removesuffix(".bias")
        theirs = diffusers_name(weight).removesuffix(".weight").removesuffix(".bias")
        for alias in (theirs, original):
            modules[alias.replace(".", "_")] = modules[alias] = original
    return modules


def _native(key: str, modules: Mapping[str, str]) -> str | None:
    """ComfyUI's name of a LoRA's tensor; None where the tensor is for no module of the model."""
    flat = next((prefix for prefix in _FLAT_PREFIXES if key.startswith(prefix)), "")
    rest = key.removeprefix(flat)
    while not flat and (prefix := next((p for p in _PREFIXES if rest.startswith(p)), "")):
        rest = rest.removeprefix(prefix)
    dots = [i for i, letter in enumerate(rest) if letter == "."]
    for dot in reversed(dots):  # the longest name, as one may begin with another
        module = modules.get(rest[:dot])
        if module is not None:
            return f"{NATIVE}{module}{rest[dot:]}"
    return None
