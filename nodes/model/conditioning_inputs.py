"""What ComfyUI hands to a Wan transformer beside latent, timestep and text, in the form that the pool takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch

from ...wanvideo.base.conditioning import Conditioning
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.options import PLAIN_ROPE, Options, RopeOptions
from ...wanvideo.model.context_tokens import tail_of
from ...wanvideo.ops.rope import FULL_RATE
from ..common import refusals

log = logging.getLogger(__name__)

_LATENT_NODES = {
    "text-to-video": "EmptyHunyuanLatentVideo",
    "image-to-video": "WanImageToVideo",
    "Fun-Control": "WanFunControlToVideo or Wan22FunControlToVideo",
    "Fun-Camera": "WanCameraImageToVideo",
    "VACE": "WanVaceToVideo",
    "Animate": "WanAnimateToVideo",
    "S2V": "WanSoundImageToVideo",
    "SCAIL": "WanSCAILToVideo",
    "SCAIL-2": "WanSCAILToVideo",
    "HuMo": "WanHuMoImageToVideo",
    "WanDancer": "WanDancerVideo",
}
_SCAIL_APART = 120.0  # rows or columns that SCAIL puts between the places of a pose or reference and the video's


def latent_node(config: WanConfig) -> str:
    """The node whose latent and conditioning a model of this variant takes."""
    if config.variant == "text-to-video" and config.out_dim == 48:
        return "Wan22ImageToVideoLatent"
    return _LATENT_NODES[config.variant]


def check_start_image(config: WanConfig, image: object | None) -> None:
    """Refuse a start image (or control video) that the model has no channels for; say where one is missing.

    Raises:
        WrongVariant: a text-to-video or VACE model is given one.
    """
    takes_image = config.in_dim > config.out_dim and not (config.pose_dim or config.humo)  # which have references
    if image is not None and not takes_image:
        refusals.refuse_variant(
            "a start image or control video (concat_latent_image)", config.variant, "WanImageToVideo"
        )
    if image is None and takes_image:  # ComfyUI puts zeros there
        log.warning(
            "This is an %s model, and the conditioning has no image for it. Connect %s with an image or video.",
            config.variant,
            latent_node(config),
        )


def from_comfyui(config: WanConfig, transformer_options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Conditioning:
    """Translate the keyword arguments of ComfyUI's `WanModel.forward`.

    Raises:
        NotOnWorkers, WrongVariant: something would be left out.
    """
    taken = {name: inputs.get(name) for name in _taken(config)}
    refusals.refuse_transformer_options(transformer_options)
    refusals.refuse_inputs({name: value for name, value in inputs.items() if name not in taken}, config.variant)
    strengths = inputs.get("vace_strength") if config.vace_layers else None
    options = Options(
        vace_strengths=tuple(float(strength) for strength in strengths or ()),
        skip_blocks=skipped_blocks(transformer_options),
        rope=_rope(transformer_options),
    )
    if config.music:
        options = replace(options, fps=_coarse_rate(taken), audio_scale=float(_given(taken, "audio_inject_scale", 1.0)))
    conditioning = Conditioning(
        image=taken.get("clip_fea") if config.image_dim else None,
        camera=taken.get("camera_conditions"),
        vace=taken.get("vace_context"),
        reference=None if config.sound else taken.get("reference_latent"),
        extra_frames=taken.get("time_dim_concat"),
        pose=taken.get("pose_latents") if config.face else None,
        face=taken.get("face_pixel_values"),
        control=taken.get("control_video"),
        subject=taken.get("reference_latent") if config.sound else None,
        so_far=taken.get("reference_motion"),
        audio=taken.get("audio_embed"),
        image_ref=taken.get("clip_fea_ref"),
        options=options,
    )
    if config.humo and conditioning.reference is not None:
        return _with_subject(conditioning)
    if config.pose_dim:
        return _with_pose(conditioning, taken)
    if taken.get("context_latents"):
        return _with_context(conditioning, taken["context_latents"])
    return conditioning


def _given(taken: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if taken.get(name) is None else taken[name]


def _coarse_rate(taken: Mapping[str, Any]) -> float:
    """Frames a second of WanDancer's first, coarse video; 0 where frames are made at the full rate."""
    fps = float(_given(taken, "fps", FULL_RATE))
    return 0.0 if int(fps + 0.5) == FULL_RATE else fps


def _with_subject(conditioning: Conditioning) -> Conditioning:
    """HuMo's reference image is a frame behind the video, in which nothing is heard."""
    frames, audio = conditioning.reference, conditioning.audio
    if audio is not None:
        audio = torch.cat([audio, audio.new_zeros(audio.shape[0], frames.shape[2], *audio.shape[2:])], dim=1)
    return replace(conditioning, reference=None, extra_frames=frames, audio=audio)


def _with_context(conditioning: Conditioning, latents: Sequence[torch.Tensor]) -> Conditioning:
    """Bernini's source and reference videos, in the order that tells them apart."""
    tail, segments = tail_of(latents, conditioning.options.rope, turned=True)
    return replace(conditioning, tail=tail, options=replace(conditioning.options, tail=segments))


def _with_pose(conditioning: Conditioning, taken: Mapping[str, Any]) -> Conditioning:
    """SCAIL's references, pose and masks.

    To animate a reference image, its frame comes before the video's. To replace a person (`ref_mask_flag` is False),
    the reference begins with the video, below it. The pose begins with the video, to the right of it.
    """
    options, pose, masks = conditioning.options, taken.get("pose_latents"), taken.get("sam_latents")
    references = 0 if conditioning.reference is None else conditioning.reference.shape[2]
    first = float(references)
    if taken.get("ref_mask_flag") is not None and not bool(taken["ref_mask_flag"]):
        first = max(first - 1, 0.0)
        video = replace(options.rope, shift_t=options.rope.shift_t + first)
        options = replace(options, rope=video, reference_rope=RopeOptions(shift_y=_SCAIL_APART))
    tail = None
    if pose is not None:
        streams = pose if masks is None else torch.cat([pose, masks.to(pose)], dim=1)
        places = RopeOptions(shift_t=first, shift_x=_SCAIL_APART)
        tail, segments = tail_of([streams], places, stretched=True)
        options = replace(options, tail=segments)
    return replace(conditioning, tail=tail, mask=taken.get("ref_mask_latents"), options=options)


def _taken(config: WanConfig) -> set[str]:
    """The inputs that a model of this variant reads, and the one that ComfyUI's own model ignores as well."""
    names = {"time_dim_concat"}
    if config.image_dim or config.variant not in ("text-to-video", "VACE"):
        names.add("clip_fea")  # left out where the model has no CLIP tokens, as that of Wan 2.2
    if config.reference_dim:
        names.add("reference_latent")
    if config.camera_dim:
        names.add("camera_conditions")
    if config.vace_layers:
        names |= {"vace_context", "vace_strength"}
    if config.face:
        names |= {"pose_latents", "face_pixel_values"}
    if config.sound:
        names |= {"audio_embed", "control_video", "reference_latent", "reference_motion"}
    if config.pose_dim:
        names |= {"reference_latent", "pose_latents"}
    if config.humo:
        names |= {"reference_latent", "audio_embed"}
    if config.music:
        names |= {"audio_embed", "clip_fea_ref", "fps", "audio_inject_scale"}
    if config.mask_dim:
        names |= {"sam_latents", "ref_mask_latents", "ref_mask_flag"}
    if config.variant in ("text-to-video", "image-to-video", "Fun-Control"):
        names.add("context_latents")
    return names


def _skip(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return args


def skipped_blocks(transformer_options: Mapping[str, Any]) -> tuple[int, ...]:
    """The blocks that SkipLayerGuidanceDiT leaves out: those replaced by a function that returns its first argument.

    Raises:
        NotOnWorkers: a block is replaced by anything else.
    """
    replaced = transformer_options.get("patches_replace", {}).get("dit", {})
    if not all(_only_skips(function) for function in replaced.values()):
        refusals.refuse_replacement(["dit"])
    return tuple(sorted(key[1] for key in replaced if key[0] == "double_block"))  # Wan has no others


def _only_skips(function: object) -> bool:
    """Whether a function's code is that of `_skip`, whatever its names."""
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    return code.co_code == _skip.__code__.co_code and code.co_argcount == 2


def _rope(transformer_options: Mapping[str, Any]) -> RopeOptions:
    given = transformer_options.get("rope_options")
    if not given:
        return PLAIN_ROPE
    unknown = given.keys() - RopeOptions.__dataclass_fields__.keys()
    if unknown:
        refusals.refuse_rope_options(sorted(unknown))
    return RopeOptions(**{name: float(value) for name, value in given.items()})
