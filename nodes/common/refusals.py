"""Refusals, in plain words, of requests that a model in other processes cannot honour and must not drop silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ...wanvideo.base.variant import keys

_STOCK = "or load the model with ComfyUI's Load Diffusion Model, which runs it on one GPU"


class NotOnWorkers(RuntimeError):
    """The graph uses a feature that needs the weights or the blocks in the ComfyUI process."""


def refuse(what: str, instead: str) -> NoReturn:
    """Raise NotOnWorkers with `what` (a sentence without its end) and `instead` (a sentence)."""
    raise NotOnWorkers(f"{what}, but this model runs in the XDit+USP workers. {instead}")


class WrongVariant(NotOnWorkers):
    """The graph conditions another variant of Wan than the one that is loaded."""


# Inputs that change nothing in the forward: Wan 2.2 5B has used the mask for the timestep already.
_HARMLESS_INPUTS = frozenset({"denoise_mask"})


def refuse_variant(what: str, variant: str, node: str) -> NoReturn:
    """Raise WrongVariant, as `node` has added `what`, for which a model of this variant has no input."""
    raise WrongVariant(
        f"The conditioning carries {what}, but this is {_an(variant)} model, which has no input for it. "
        f"Load a model of the variant that {node} is made for, or remove that node."
    )


def refuse_inputs(inputs: Mapping[str, Any], variant: str) -> None:
    """Refuse inputs of a forward that a model of `variant` does not read, unless they are None or change nothing.

    Raises:
        NotOnWorkers: for the first such input.
    """
    if inputs.get("control") is not None:
        refuse(
            "A ControlNet is applied to the conditioning",
            f"ControlNet comes in a later version: remove the Apply ControlNet node, {_STOCK}.",
        )
    for name, value in inputs.items():
        if value is None or name in _HARMLESS_INPUTS or name == "control":
            continue
        if key := keys().get(name):
            if not key.what:
                continue
            refuse_variant(f"{key.what} ({name})", variant, key.node)
        refuse(
            f"The conditioning carries an extra input ({name})",
            f"That comes in a later version: remove the node that adds {name}, {_STOCK}.",
        )


def _an(variant: str) -> str:
    return f"{'an' if variant.startswith((*'aeiouA', 'S2')) else 'a'} {variant}"


def refuse_transformer_options(options: Mapping[str, Any]) -> None:
    """Refuse code that ComfyUI's own Wan model would run inside the blocks. Skipped blocks are not refused.

    Raises:
        NotOnWorkers: patches of attention or blocks.
    """
    replaced = sorted(name for name, blocks in options.get("patches_replace", {}).items() if blocks and name != "dit")
    if replaced:
        refuse_replacement(replaced)
    patched = sorted(name for name, patches in options.get("patches", {}).items() if patches)
    if patched:
        refuse(
            f"A node patches transformer blocks or their attention (patches: {', '.join(patched)}), "
            "as Uni3C and NAGuidance do",
            f"Remove that node, {_STOCK}.",
        )


def refuse_replacement(names: Sequence[str]) -> NoReturn:
    """Refuse blocks, or attention inside blocks, that a node replaces; `names` are ComfyUI's names for them."""
    refuse(
        "A node replaces transformer blocks or their attention by its own code (patches_replace: "
        f"{', '.join(names)}), as PerturbedAttentionGuidance does",
        f"Remove that node, {_STOCK}.",
    )


def refuse_rope_options(names: Sequence[str]) -> NoReturn:
    """Refuse changes of the rotary positions that these options name and the workers do not know."""
    refuse(
        f"A node changes the positions in an unknown way (rope_options: {', '.join(names)})", f"Remove it, {_STOCK}."
    )


def refuse_merging() -> NoReturn:
    """Refuse to merge this model with another one."""
    refuse(
        "A model merge needs the weights in the ComfyUI process",
        "Merge with stock loaders first, save the result with Save Model, and load that file here.",
    )


def refuse_saving() -> NoReturn:
    """Refuse to save the model or a LoRA made from it."""
    refuse(
        "Saving needs the weights in the ComfyUI process",
        "Load the file with ComfyUI's Load Diffusion Model and save from there.",
    )


def refuse_weight_hooks() -> NoReturn:
    """Refuse weights that a hook gives to some of the conditioning."""
    refuse(
        "A hook gives some of the conditioning its own weights (Create Hook LoRA, Create Hook Model as LoRA)",
        "Remove the hook and use LoraLoaderModelOnly behind the loader, which acts on the whole model.",
    )


def refuse_injection(key: str) -> NoReturn:
    """Refuse code that a node injects into the layers; `key` is ComfyUI's name of the injection."""
    refuse(
        f"A node injects code into the model's layers ({key})",
        f"Remove that node (for a LoRA: use LoraLoaderModelOnly, not a bypass loader), {_STOCK}.",
    )


def refuse_module(name: str) -> NoReturn:
    """Refuse to hand out a module of the transformer."""
    refuse(
        f"A node reaches into the transformer's modules (diffusion_model.{name})",
        f"Remove that node (for a LoRA: use LoraLoaderModelOnly), {_STOCK}.",
    )


def refuse_object_patch(name: str) -> NoReturn:
    """Refuse another object in the place of a part of the transformer."""
    refuse(f"A node replaces a part of the transformer ({name})", f"Remove that node, {_STOCK}.")


def refuse_weight_wrapper(name: str) -> NoReturn:
    """Refuse a function around a weight."""
    refuse(f"A node wraps a weight of the transformer ({name})", f"Remove that node, {_STOCK}.")


def refuse_compute_dtype(dtype: object) -> NoReturn:
    """Refuse a precision that a node asks for."""
    refuse(
        f"ModelComputeDtype asks for {str(dtype).removeprefix('torch.')}",
        "Remove that node and set use_fp16 or use_bf16 in XDit+USP Config.",
    )


def refuse_multigpu_clone() -> NoReturn:
    """Refuse a copy of the model on another GPU."""
    refuse(
        "MultiGPU CFG Split or Select Model Device wants a copy of the model on another GPU",
        "Remove that node: data_parallel_size 2 in XDit+USP Config puts the two branches on different GPUs.",
    )
