"""Wan as it was first made: text to video, and image to video. Only their numbers of channels tell them apart.

An image-to-video model of Wan 2.1 also attends to the CLIP tokens of its images, which every model may do (see
`WanModel.image_context`). A model of 5 billion parameters makes videos from images too, but as a text-to-video model
whose first latent frame is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.variant import Variant
from ..model.context_tokens import CONTEXT_LATENTS, with_context_videos

_CHANNELS_5B = 48


class TextToVideo(Variant):
    """Text to video: what is denoised is all that comes in."""

    name = "text-to-video"
    order = 0
    comfyui_names = ("t2v",)
    settings = (CONTEXT_LATENTS,)

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether as many channels come in as go out."""
        return in_dim == out_dim

    def latent_node(self, config: WanConfig) -> str:
        """The node that makes the latent, which has other channels and another size for the 5B model."""
        return "Wan22ImageToVideoLatent" if config.out_dim == _CHANNELS_5B else "EmptyHunyuanLatentVideo"

    def tail_channels(self, config: WanConfig) -> tuple[int, ...]:
        """Bernini's videos, as many channels as the latent has."""
        return (config.in_dim,)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with Bernini's videos."""
        return with_context_videos(conditioning, given)


class ImageToVideo(Variant):
    """Image to video: beside the latent come the image as a video and a mask of its frames; Fun-InP and
    first-last-frame are this variant too."""

    name = "image-to-video"
    order = 1
    comfyui_names = ("i2v",)
    node = "WanImageToVideo"
    settings = (CONTEXT_LATENTS,)
    ignored = ("clip_fea",)

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether there are other channels than those of the latent, and not those of two videos beside."""
        return in_dim != out_dim and in_dim < 3 * out_dim

    def tail_channels(self, config: WanConfig) -> tuple[int, ...]:
        """Bernini's videos, as many channels as come in."""
        return (config.in_dim,)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with Bernini's videos."""
        return with_context_videos(conditioning, given)
