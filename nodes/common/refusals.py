"""Refusals, in plain words, of requests that a model in other processes cannot honour and must not drop silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ...wanvideo.base.user_error import UserError
from ...wanvideo.base.variant import keys
from .origin import asking_code, origins_of

_STOCK = "or load the model with ComfyUI's Load Diffusion Model, which runs it on one GPU"


class NotOnWorkers(UserError, RuntimeError):
    """The graph uses a feature that needs the weights or the blocks in the ComfyUI process."""


def refuse(what: str, instead: str) -> NoReturn:
    """Raise NotOnWorkers with `what` (a sentence without its end) and `instead` (a sentence)."""
    raise NotOnWorkers(f"{what}, but this model runs in the XDit+USP workers. {instead}")


class PartOnWorkers(NotOnWorkers, AttributeError):
    """The graph uses a part of the transformer. An AttributeError too, as which hasattr and getattr take it."""


class WrongVariant(NotOnWorkers):
    """The graph conditions another variant of Wan than the one that is loaded."""


# Inputs that change nothing in the forward: Wan 2.2 5B has used the mask for the timestep already.
_HARMLESS_INPUTS = frozenset({"denoise_mask"})


def refuse_variant(what: str, variant: str, node: str) -> NoReturn:
    """Raise WrongVariant, as the conditioning has `what`, for which a model of this variant has no input.

    Args:
        node: the node, or nodes, of ComfyUI for the variants that have such an input.
    """
    raise WrongVariant(
        f"The conditioning carries {what}, but this is {_an(variant)} model, which has no input for it. "
        f"Remove the node that adds it, or load a model of a variant that takes it, as {node} needs."
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
    replaced = {name: blocks for name, blocks in options.get("patches_replace", {}).items() if name != "dit"}
    for name, blocks in sorted(replaced.items()):
        if blocks:
            refuse_replacement(name, blocks.values())
    for name, patches in sorted(options.get("patches", {}).items()):
        if patches:
            refuse_patch(name, patches)


def refuse_patch(name: str, patches: Iterable[object]) -> NoReturn:
    """Refuse code that a node has added to blocks or to their attention; `name` is ComfyUI's name for the place."""
    refuse(
        f"A node patches transformer blocks or their attention (patches: {name} by {origins_of(patches)})",
        f"Remove that node, {_STOCK}.",
    )


def refuse_replacement(name: str, replacements: Iterable[object]) -> NoReturn:
    """Refuse blocks, or attention inside blocks, that a node replaces; `name` is ComfyUI's name for the place."""
    instead = " (to skip layers use ComfyUI's SkipLayerGuidanceDiT, which works here)" if name == "dit" else ""
    refuse(
        "A node replaces transformer blocks or their attention by its own code "
        f"(patches_replace: {name} by {origins_of(replacements)})",
        f"Remove that node{instead}, {_STOCK}.",
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


# What serves the purpose for which nodes reach for a part, by a word in the part's path.
_INSTEAD = {
    "forward_orig": "a cache that works here is ComfyUI's EasyCache",
    "rope": "ComfyUI's ScaleROPE, which moves positions, works here",
    "attn": "attention_mode in the loader chooses another attention kernel",
    "lora": "LoraLoaderModelOnly takes LoRAs",
}


def _remove(path: str) -> str:
    """The sentence that says what to do about a node that reaches for the part of the transformer at `path`."""
    instead = next((advice for word, advice in _INSTEAD.items() if word in path), "")
    return f"Remove that node{f' ({instead})' if instead else ''}, {_STOCK}."


def _asker() -> str:
    asker = asking_code()
    return f"A node ({asker})" if asker else "A node"


def refuse_part(path: str) -> NoReturn:
    """Raise PartOnWorkers, as a node asks for the attribute `path` of the transformer, which has no value here."""
    what = f"{_asker()} reaches for a part of the transformer (diffusion_model.{path})"
    raise PartOnWorkers(f"{what}, but this model runs in the XDit+USP workers. {_remove(path)}")


def refuse_call(path: str) -> NoReturn:
    """Refuse to compute a part of the transformer."""
    refuse(f"{_asker()} calls a part of the transformer (diffusion_model.{path})", _remove(path))


def refuse_object_patch(name: str) -> NoReturn:
    """Refuse another object in the place of a part of the transformer."""
    refuse(f"{_asker()} replaces a part of the transformer ({name})", _remove(name))


def refuse_weights() -> NoReturn:
    """Refuse weights that a node puts into the transformer."""
    refuse(f"{_asker()} puts weights of its own into the transformer", f"Remove that node, {_STOCK}.")


def refuse_pickling() -> NoReturn:
    """Refuse to write the transformer into a file or to another process as a Python object."""
    refuse(f"{_asker()} pickles the model", f"Remove that node, {_STOCK}.")


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
