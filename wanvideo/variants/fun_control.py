"""Fun-Control: a control video and an image in further channels, and perhaps a reference image as a frame of its own.

The reference's tokens stand in front of those of the video, embedded by a convolution of their own.

Source: VideoX-Fun `wan_transformer3d.py`; shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part
from ..base.shapes import Shapes, convolution
from ..base.variant import Input, Key, TensorShapes, Variant
from ..model.context_tokens import CONTEXT_LATENTS, with_context_videos
from ..model.embeddings import Convolution
from ..model.model import WanModel


class FunControl(Variant):
    """Fun-Control, recognised by its number of channels."""

    name = "Fun-Control"
    order = 2
    node = "WanFunControlToVideo or Wan22FunControlToVideo"
    settings = (CONTEXT_LATENTS,)
    ignored = ("clip_fea",)

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether the input has the channels of a control video and of an image beside the latent's."""
        return in_dim >= 3 * out_dim and in_dim != out_dim

    def context_channels(self, config: WanConfig) -> tuple[int, ...]:
        """The number of channels of Bernini's videos, which is that of the model's input."""
        return (config.in_dim,)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with Bernini's videos."""
        return with_context_videos(conditioning, given)


@dataclass(frozen=True)
class Reference(Variant):
    """A reference latent, which is one frame in front of the video; `channels` is the number of its channels."""

    channels: int

    order = 10
    inputs = (
        Input(
            "reference",
            lambda own, asked: (asked.batch, own.channels, asked.height, asked.width),
            Key("reference_latent", "a reference latent", "Wan22FunControlToVideo"),
        ),
    )
    first_stage = frozenset({"ref_conv"})

    @classmethod
    def read(cls, tensors: TensorShapes) -> Reference | None:
        """The variant with the reference's channels; None without the reference's convolution."""
        channels = tensors.size("ref_conv.weight", 1)
        return cls(channels) if channels else None

    def shapes(self, config: WanConfig) -> Shapes:
        """The convolution's tensors."""
        return convolution("ref_conv", self.channels, config.dim, 2, 2)

    def layers(self) -> type[ReferenceModel]:
        """`ReferenceModel`."""
        return ReferenceModel


class ReferenceEmbedding(Convolution):
    """The convolution of a reference latent (kernel = stride = patch) as one product over its tokens."""

    def __init__(self, channels: int, dim: int):
        super().__init__(channels, dim, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens [B, n, C*4] of `patchify`, whose first channels are the reference's, as float32 [B, n, dim]."""
        weight = self.weight.flatten(1).float()
        return F.linear(tokens[..., : weight.shape[1]].float(), weight, self.bias)


class ReferenceModel(WanModel):
    """A DiT whose first frames may be a reference."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.ref_conv = ReferenceEmbedding(config[Reference].channels, config.dim)

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens `video`; the tokens of the reference go through a convolution of their own."""
        x = super().embed_video(tokens, grid, video, conditioning)
        if conditioning.options.reference_frames:
            places = torch.arange(grid.tokens, device=tokens.device)[video]
            front = places < conditioning.options.reference_frames * grid.frame_tokens
            x[:, front] = self.ref_conv(tokens[:, front])
        return x
