"""Fun-Camera: a camera path for each pixel, added to the embedding of the tokens.

Source: VideoX-Fun `wan_camera_adapter.py`; shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning, check_no_subjects
from ..base.config import WanConfig
from ..base.grid import Grid, Part, frames_of, pad_to_patch
from ..base.shapes import Shapes, convolution
from ..base.variant import Input, Key, TensorShapes, Variant
from ..model.embeddings import Convolution
from ..model.model import WanModel

PIXELS = 8  # of a camera path, along each side of one latent pixel


@dataclass(frozen=True)
class FunCamera(Variant):
    """Fun-Camera; `channels` is the number of channels that the camera path has for each pixel."""

    channels: int

    name = "Fun-Camera"
    order = 20
    comfyui_names = ("camera", "camera_2.2")
    node = "WanCameraImageToVideo"
    inputs = (
        Input(
            "camera",
            lambda own, asked: (asked.batch, own.channels, asked.frames, PIXELS * asked.height, PIXELS * asked.width),
            Key("camera_conditions", "a camera path", "WanCameraImageToVideo"),
        ),
    )
    ignored = ("clip_fea",)
    first_stage = frozenset({"control_adapter"})

    @classmethod
    def read(cls, tensors: TensorShapes) -> FunCamera | None:
        """The variant with the camera path's channels; None without a camera adapter."""
        channels = tensors.size("control_adapter.conv.weight", 1) // PIXELS**2
        return cls(channels) if channels else None

    def shapes(self, config: WanConfig) -> Shapes:
        """The adapter's tensors."""
        shapes = convolution("control_adapter.conv", self.channels * PIXELS**2, config.dim, 2, 2)
        for i in (1, 2):
            shapes |= convolution(f"control_adapter.residual_blocks.0.conv{i}", config.dim, config.dim, 3, 3)
        return shapes

    def layers(self) -> type[CameraModel]:
        """`CameraModel`."""
        return CameraModel

    def check(self, config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Check that the conditioning has no extra frames, as the camera path has none.

        Raises:
            ValueError: the conditioning has extra frames.
        """
        if conditioning.camera is not None:
            check_no_subjects(conditioning)


class CameraResidual(nn.Module):
    """Two convolutions of [B, dim, rows, columns], added to their input."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = Convolution(dim, dim, 3, padding=1)
        self.conv2 = Convolution(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, dim, rows, columns] to the same shape."""
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Encodes a camera path as a vector for each token; a vector depends on the pixels of one frame alone."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.conv = Convolution(channels * PIXELS**2, dim, 2, stride=2)
        self.residual_blocks = nn.Sequential(CameraResidual(dim))

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        """One frame [B, channels, 8*H, 8*W] to [B, rows*columns, dim] of its tokens."""
        pixels = pad_to_patch(F.pixel_unshuffle(frame, PIXELS))
        return self.residual_blocks(self.conv(pixels)).flatten(2).transpose(1, 2)


class CameraModel(WanModel):
    """A DiT that follows a camera path."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.control_adapter = CameraAdapter(config[FunCamera].channels, config.dim)

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens `video` with the camera path of their frames added; other frames are not computed."""
        x = super().embed_video(tokens, grid, video, conditioning)
        if conditioning.camera is not None:
            window, own = frames_of(grid, video)
            frames = (frame.to(x.device, self.compute_dtype) for frame in conditioning.camera[:, :, window].unbind(2))
            x += torch.cat([self.control_adapter(frame) for frame in frames], dim=1)[:, own]
        return x
