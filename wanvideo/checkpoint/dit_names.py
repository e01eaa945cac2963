"""Which tensors of a file belong to its Wan DiT: the prefix of their names, and the tensors that ComfyUI ignores.

ComfyUI strips `model.diffusion_model.`, `model.model.`, `net.` or `model.`; trainers write other prefixes. Here a
prefix is whatever stands before Wan's own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..base.tensor_info import CheckpointError, FileHeader, TensorInfo, elements
from .diffusers_names import MARKER, has_diffusers_names

HEAD = "head.modulation"
_QUERIES = "blocks.0.self_attn.q.weight"
_COMFYUI_ORDER = ("model.diffusion_model.", "model.model.", "net.", "model.", "", "diffusion_model.")
"""The prefixes that ComfyUI strips, in the order in which it prefers them, and two that LoRA tools and others write."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch.compile, FSDP and activation checkpointing leave."""

_OTHER_PART = re.compile(
    r"(vae|first_stage_model|cond_stage_model|conditioner|text_encoders?(_2)?|clip(_[lg]|_vision)?|image_encoder"
    r"|t5(xxl)?|umt5_?xxl|tokenizer|model_ema|optimizer|lr_scheduler|loss|discriminator)\."
)
"""Starts of the names of other models of a pipeline, and of what a trainer saves beside a model."""
_BUFFER = re.compile(
    r"(.*\.)?(freqs(_cis|_cos|_sin)?|inv_freq|rope|rotary_emb|num_batches_tracked|global_step|step|logvar|betas"
    r"|alphas_cumprod|sigmas|timesteps|v_pred|ztsnr)(\..*)?"
)
"""Names of buffers, whose numbers a model computes itself or never reads."""
_COUNTERS = frozenset(("I64", "I32", "I16", "U64", "U32", "U16", "BOOL"))
"""Types of counters, positions and switches. Packed weights have some of them too, under the names in `_LEARNED`."""
_LEARNED = (".weight", ".bias", ".qweight", ".qzeros")


def without_wrappers(file_header: FileHeader) -> FileHeader:
    """The header of a file with the names that its tensors have outside of torch's wrappers."""
    if not any(wrapper in name for name in file_header.tensors for wrapper in _WRAPPERS):
        return file_header
    return replace(file_header, tensors={_unwrapped(name): info for name, info in file_header.tensors.items()})


def find_prefix(path: str, names: Mapping[str, object]) -> str | None:
    """The text before the names of the Wan DiT's tensors; None where a file has no Wan DiT.

    Where several prefixes have a DiT, it is the prefix that ComfyUI takes.

    Raises:
        CheckpointError: the file has several Wan DiTs, and ComfyUI takes none of them.
    """
    found = {name.removesuffix(end) for end in (HEAD, MARKER) for name in names if name.endswith(end)}
    found = {prefix for prefix in found if prefix[-1:] in ("", ".") and _has_dit(names, prefix)}
    known = [prefix for prefix in _COMFYUI_ORDER if prefix in found]
    if known or len(found) < 2:
        return next(iter((*known, *found)), None)
    raise CheckpointError(
        f"{Path(path).name} holds {len(found)} Wan models, under {' and '.join(sorted(found))}. "
        "Choose a file with one model."
    )


def own_names(names: Mapping[str, object], prefix: str) -> list[str]:
    """The names behind `prefix`, without those of other models of a pipeline."""
    return [name for name in names if name.startswith(prefix) and not _OTHER_PART.match(name.removeprefix(prefix))]


def without_strays(file_header: FileHeader, prefix: str) -> tuple[FileHeader, tuple[str, ...]]:
    """The header of a file without the tensors that ComfyUI ignores without harm, and the names of these tensors.

    They are buffers, counters, and other models of a pipeline under names of their own. Tensors beside the `prefix` and
    tensors without a number are left out silently.
    """
    strays, own = [], {}
    for name, info in file_header.tensors.items():
        if not name.startswith(prefix) or not elements(info.shape):
            continue
        if _is_stray(name.removeprefix(prefix), info):
            strays.append(name)
        else:
            own[name] = info
    return replace(file_header, tensors=own), tuple(strays)


def _has_dit(names: Mapping[str, object], prefix: str) -> bool:
    return (prefix + HEAD in names and prefix + _QUERIES in names) or has_diffusers_names(names, prefix)


def _is_stray(name: str, info: TensorInfo) -> bool:
    if _OTHER_PART.match(name) or _BUFFER.fullmatch(name):
        return True
    return info.dtype in _COUNTERS and not name.endswith(_LEARNED)


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
