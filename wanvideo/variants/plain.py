"""Text to video and image to video, the first variants of Wan. Only the numbers of channels tell the two apart.

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
    """Text to video: the input has only the channels of the denoised latent."""

    name = "text-to-video"
    order = 0
    comfyui_names = ("t2v",)
    settings = (CONTEXT_LATENTS,)

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether the input has as many channels as the output."""
        return in_dim == out_dim

    def latent_node(self, config: WanConfig) -> str:
        """The node that makes the latent, which has other channels and another size for the 5B model."""
        return "Wan22ImageToVideoLatent" if config.out_dim == _CHANNELS_5B else "EmptyHunyuanLatentVideo"

    def context_channels(self, config: WanConfig) -> tuple[int, ...]:
        """The number of channels of Bernini's videos, which is that of the latent."""
        return (config.in_dim,)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with Bernini's videos."""
        return with_context_videos(conditioning, given)


class ImageToVideo(Variant):
    """Image to video: the input has the latent, the image as a video, and a mask of the frames that the image fills.
    Fun-InP and first-last-frame models are of this variant too."""

    name = "image-to-video"
    order = 1
    comfyui_names = ("i2v",)
    node = "WanImageToVideo"
    settings = (CONTEXT_LATENTS,)
    ignored = ("clip_fea",)

    @classmethod
    def fits(cls, in_dim: int, out_dim: int) -> bool:
        """Whether the input has channels beside the latent's, but fewer than two further videos would have."""
        return in_dim != out_dim and in_dim < 3 * out_dim

    def context_channels(self, config: WanConfig) -> tuple[int, ...]:
        """The number of channels of Bernini's videos, which is that of the model's input."""
        return (config.in_dim,)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with Bernini's videos."""
        return with_context_videos(conditioning, given)
