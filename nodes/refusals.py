"""What a model that runs in other processes cannot honour, said in plain words instead of being dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

_STOCK = "or load the model with ComfyUI's Load Diffusion Model, which runs it on one GPU"


class NotOnWorkers(RuntimeError):
    """A feature of the graph that needs the weights or the blocks in the ComfyUI process."""


def refuse(what: str, instead: str) -> NoReturn:
    """Raise NotOnWorkers with `what` (a sentence without its end) and `instead` (a sentence)."""
    raise NotOnWorkers(f"{what}, but this model runs in the XDit+USP workers. {instead}")


# Inputs that some Wan variants take, by the name that ComfyUI gives them in forward.
_VARIANT_INPUTS = {
    "clip_fea": "a CLIP vision embedding (image-to-video)",
    "time_dim_concat": "subject images (WanPhantomSubjectToVideo)",
    "reference_latent": "a reference latent",
    "context_latents": "context latents (Bernini)",
    "vace_context": "a VACE control video",
    "camera_conditions": "a camera path (WanCameraImageToVideo)",
    "audio_embed": "an audio embedding (S2V, HuMo)",
    "pose_latents": "pose latents (Animate, SCAIL)",
    "face_pixel_values": "a face video (WanAnimateToVideo)",
}
# What an input may be without changing anything: Wan 2.2 5B has used the mask for the timestep already.
_HARMLESS_INPUTS = frozenset({"denoise_mask"})


def refuse_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuse every input of a forward beside latent, timestep and text that holds something.

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
        refuse(
            f"The conditioning carries {_VARIANT_INPUTS.get(name, 'an extra input')} ({name})",
            f"Text-to-video is what it can do so far: remove the node that adds {name}, {_STOCK}.",
        )


def refuse_transformer_options(options: Mapping[str, Any]) -> None:
    """Refuse what ComfyUI's own Wan model would read from `transformer_options` inside the blocks.

    Raises:
        NotOnWorkers: patches of attention or blocks, an attention override, or changed RoPE positions.
    """
    replaced = sorted(name for name, blocks in options.get("patches_replace", {}).items() if blocks)
    if replaced:
        refuse(
            "A node replaces transformer blocks or their attention (patches_replace: "
            f"{', '.join(replaced)}), as SkipLayerGuidanceDiT and PerturbedAttentionGuidance do",
            f"Remove that node, {_STOCK}.",
        )
    patched = sorted(name for name, patches in options.get("patches", {}).items() if patches)
    if patched:
        refuse(
            f"A node patches transformer blocks or their attention (patches: {', '.join(patched)}), "
            "as InfiniteTalk, Uni3C and NAGuidance do",
            f"Remove that node, {_STOCK}.",
        )
    if options.get("optimized_attention_override") is not None:
        refuse(
            "A node overrides the attention function (optimized_attention_override)",
            "Remove that node and choose attention_mode in XDit+USP WanVideo Model Loader.",
        )
    if options.get("rope_options"):
        refuse("ScaleROPE changes the positions (rope_options)", f"Remove that node, {_STOCK}.")


def refuse_merging() -> NoReturn:
    refuse(
        "A model merge needs the weights in the ComfyUI process",
        "Merge with stock loaders first, save the result with Save Model, and load that file here.",
    )


def refuse_saving() -> NoReturn:
    refuse(
        "Saving needs the weights in the ComfyUI process",
        "Load the file with ComfyUI's Load Diffusion Model and save from there.",
    )


def refuse_weight_hooks() -> NoReturn:
    refuse(
        "A hook gives some of the conditioning its own weights (Create Hook LoRA, Create Hook Model as LoRA)",
        "Remove the hook and use LoraLoaderModelOnly behind the loader, which acts on the whole model.",
    )


def refuse_injection(key: str) -> NoReturn:
    refuse(
        f"A node injects code into the model's layers ({key})",
        f"Remove that node (for a LoRA: use LoraLoaderModelOnly, not a bypass loader), {_STOCK}.",
    )


def refuse_module(name: str) -> NoReturn:
    refuse(
        f"A node reaches into the transformer's modules (diffusion_model.{name})",
        f"Remove that node (for a LoRA: use LoraLoaderModelOnly), {_STOCK}.",
    )


def refuse_object_patch(name: str) -> NoReturn:
    refuse(f"A node replaces a part of the transformer ({name})", f"Remove that node, {_STOCK}.")


def refuse_weight_wrapper(name: str) -> NoReturn:
    refuse(f"A node wraps a weight of the transformer ({name})", f"Remove that node, {_STOCK}.")


def refuse_compute_dtype(dtype: object) -> NoReturn:
    refuse(
        f"ModelComputeDtype asks for {str(dtype).removeprefix('torch.')}",
        "Remove that node and set use_fp16 or use_bf16 in XDit+USP Config.",
    )


def refuse_multigpu_clone() -> NoReturn:
    refuse(
        "MultiGPU CFG Split or Select Model Device wants a copy of the model on another GPU",
        "Remove that node: data_parallel_size 2 in XDit+USP Config puts the two branches on different GPUs.",
    )
