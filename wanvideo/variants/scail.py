"""SCAIL and SCAIL-2: an image-to-video model that follows a pose video at half the size.

The tokens of the pose are context tokens and have an embedding of their own; references are frames before the video.
SCAIL-2 tells persons apart by masks, whose embeddings are added to those of the video and of the pose.

Source: SCAIL as ComfyUI runs it (`comfy/ldm/wan/model.py`, SCAILWanModel and SCAIL2WanModel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part, frames_of, pad_to_patch, patchify
from ..base.options import RopeOptions
from ..base.shapes import Shapes, patch_embedding
from ..base.user_error import InputError
from ..base.variant import Input, Key, TensorShapes, Variant
from ..model.context_tokens import context_tokens_of
from ..model.layers import PatchEmbedding
from ..model.model import WanModel

_APART = 120.0  # rows or columns that SCAIL puts between the places of a pose or reference and the video's
_POSE, _MASK = "patch_embedding_pose", "patch_embedding_mask"


@dataclass(frozen=True)
class Scail(Variant):
    """SCAIL; `pose_dim` is the number of channels of the pose video's latent."""

    pose_dim: int

    name = "SCAIL"
    order = 30
    comfyui_names = ("scail",)
    node = "WanSCAILToVideo"
    inputs: ClassVar[tuple[Input, ...]] = (
        Input(
            "reference",
            lambda _, asked: (asked.batch, asked.config.in_dim, None, asked.height, asked.width),
            Key("reference_latent"),
        ),
    )
    settings: ClassVar[tuple[Key, ...]] = (Key("pose_latents", "a pose video", "WanSCAILToVideo"),)
    ignored = ("clip_fea",)
    start_image = False
    first_stage = frozenset({_POSE, _MASK})

    @classmethod
    def read(cls, tensors: TensorShapes) -> Scail | None:
        """The variant with the pose's channels; None without an embedding of poses, or with one of SCAIL-2's masks."""
        pose_dim = tensors.size(f"{_POSE}.weight", 1)
        return cls(pose_dim) if pose_dim and not tensors.size(f"{_MASK}.weight", 1) else None

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the pose's embedding."""
        return patch_embedding(_POSE, self.pose_dim, config.dim)

    def layers(self) -> type[ScailModel]:
        """`ScailModel`."""
        return ScailModel

    def context_channels(self, config: WanConfig) -> tuple[int, ...]:
        """The number of channels of the pose."""
        return (self.pose_dim,)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with the pose and its masks as context tokens, and with the positions of the references.

        To animate a reference image, its frame comes before the video's. To replace a person (`ref_mask_flag` is
        False), the reference begins with the video, below it. The pose begins with the video, to the right of it.
        """
        options, pose, masks = conditioning.options, given.get("pose_latents"), given.get("sam_latents")
        references = 0 if conditioning.reference is None else conditioning.reference.shape[2]
        first = float(references)
        if given.get("ref_mask_flag") is not None and not bool(given["ref_mask_flag"]):
            first = max(first - 1, 0.0)
            video = replace(options.rope, shift_t=options.rope.shift_t + first)
            options = replace(options, rope=video, reference_rope=RopeOptions(shift_y=_APART))
        context_videos = None
        if pose is not None:
            streams = pose if masks is None else torch.cat([pose, masks.to(pose)], dim=1)
            places = RopeOptions(shift_t=first, shift_x=_APART)
            context_videos, grids = context_tokens_of([streams], places, stretched=True)
            options = replace(options, context_grids=grids)
        return conditioning.having(options, context_videos=context_videos)


@dataclass(frozen=True)
class Scail2(Scail):
    """SCAIL-2; `mask_dim` is the number of channels of the masks."""

    mask_dim: int

    name = "SCAIL-2"
    order = 31
    comfyui_names = ("scail2",)
    inputs = (
        *Scail.inputs,
        Input(
            "mask",
            lambda own, asked: (asked.batch, own.mask_dim, None, asked.height, asked.width),
            Key("ref_mask_latents", "masks of the reference images", "WanSCAILToVideo"),
        ),
    )
    settings = (
        *Scail.settings,
        Key("sam_latents", "masks of the pose video", "WanSCAILToVideo"),
        Key("ref_mask_flag"),
    )

    @classmethod
    def read(cls, tensors: TensorShapes) -> Scail2 | None:
        """The channels of the pose and of the masks; None without embeddings of both."""
        dims = tensors.size(f"{_POSE}.weight", 1), tensors.size(f"{_MASK}.weight", 1)
        return cls(*dims) if all(dims) else None

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the embeddings of the pose and of the masks."""
        return super().shapes(config) | patch_embedding(_MASK, self.mask_dim, config.dim)

    def layers(self) -> type[Scail2Model]:
        """`Scail2Model`."""
        return Scail2Model

    def context_channels(self, config: WanConfig) -> tuple[int, ...]:
        """The number of channels of the pose alone, and of the pose with its masks."""
        return (self.pose_dim, self.pose_dim + self.mask_dim)

    def check(self, config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Check that the masks cover the references and each frame of the video.

        Raises:
            InputError: the masks have more or fewer frames.
        """
        if conditioning.mask is None:
            return
        around = (conditioning.reference, conditioning.extra_frames)
        wanted = x.shape[2] + sum(tensor.shape[2] for tensor in around if tensor is not None)
        if conditioning.mask.shape[2] != wanted:
            raise InputError(
                f"The conditioning's mask has {conditioning.mask.shape[2]} latent frames, but the reference images and "
                f"the video have {wanted}. Give the conditioning node the length of the latent."
            )


class ScailModel(WanModel):
    """A DiT with a pose video as context tokens."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        pose_dim = (config.get(Scail2) or config[Scail]).pose_dim
        self.patch_embedding_pose = PatchEmbedding(pose_dim, config.dim)

    def embed_context(self, conditioning: Conditioning, places: slice, device: torch.device) -> torch.Tensor:
        """Embed the context tokens `places`, which are those of the pose."""
        return self.embed_pose(conditioning.given["context_videos"][:, places].to(device).float())

    def embed_pose(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens [B, n, C*4] of the pose as [B, n, dim], in float32."""
        return self.patch_embedding_pose(tokens)


class Scail2Model(ScailModel):
    """A DiT with a pose video as context tokens, and with masks that tell persons apart."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.patch_embedding_mask = PatchEmbedding(config[Scail2].mask_dim, config.dim)

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens `video` of the video, with the embeddings of their masks added."""
        x = super().embed_video(tokens, grid, video, conditioning)
        if conditioning.mask is not None:
            window, own = frames_of(grid, video)
            masks = conditioning.mask[:, :, window].to(x.device, torch.float32)
            x += self.patch_embedding_mask(patchify(pad_to_patch(masks))[:, own])
        return x

    def embed_pose(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens of the pose; channels behind the pose's are those of its masks, whose embedding is added."""
        own = self.patch_embedding_pose.weight[0].numel()
        x = super().embed_pose(tokens[..., :own])
        return x + self.patch_embedding_mask(tokens[..., own:]) if tokens.shape[-1] > own else x
