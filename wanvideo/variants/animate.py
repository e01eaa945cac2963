"""Wan 2.2 Animate: an image-to-video model that follows a pose video and a face video.

Each frame of the pose is added to the token embedding of the next latent frame, because the first latent frame is the
reference image. An encoder describes the face by shares of directions of motion, and turns every four frames of these
descriptions into a few tokens; behind every fifth block the tokens of a frame attend to the tokens of its face. Pose
and face act on any part of the tokens.

Sources: Wan 2.2 `wan/modules/animate/`; the face's encoder is that of LIA (arXiv 2203.09043) with StyleGAN2's blocks.
Shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part, pad_to_patch, patchify
from ..base.shapes import Shapes, linear, patch_embedding
from ..base.variant import (
    Input,
    Key,
    SideAttention,
    TensorShapes,
    Variant,
    paired_attention_splits,
)
from ..model.frames import CausalEncoder, Run, causal_encoder_shapes, few_keys, runs_of
from ..model.layers import BlockInputs, Linear, PatchEmbedding, RMSNorm
from ..model.model import Sides, WanModel
from ..ops import pointwise
from ..quant.quantized import as_tensor

_BLUR = (1.0, 3.0, 3.0, 1.0)
_AT_ONCE = 2  # face images that the encoder takes at once: 0.3 GB of activations
_STRIDE = 5  # the face adapters act behind every fifth block
_CONVOLUTIONS, _ADAPTERS = "motion_encoder.enc.net_app.convs", "face_adapter.fuser_blocks"


@dataclass(frozen=True)
class Animate(Variant):
    """The dimensions of Animate's layers.

    Args:
        pose_dim: channels of the pose video's latent.
        channels: channels of each convolution of the face encoder; each but the first halves the image.
        style: width behind the convolutions.
        directions: number of directions of motion that describe a face.
        motion: width of a description.
        hidden: width of the encoder over time.
        heads: tokens that the encoder over time makes of four frames, to which a learned token is added.
    """

    pose_dim: int = 16
    channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    style: int = 512
    directions: int = 20
    motion: int = 512
    hidden: int = 1024
    heads: int = 4

    name = "Animate"
    order = 80
    comfyui_names = ("animate",)
    node = "WanAnimateToVideo"
    inputs = (
        Input(
            "pose",
            lambda own, asked: (asked.batch, own.pose_dim, None, asked.height, asked.width),
            Key("pose_latents", "a pose video", "WanAnimateToVideo"),
        ),
        Input(
            "face",
            lambda own, asked: (asked.batch, 3, None, own.pixels, own.pixels),
            Key("face_pixel_values", "a face video", "WanAnimateToVideo"),
        ),
    )
    ignored = ("clip_fea",)
    splits = paired_attention_splits(
        *(rf"face_adapter\.fuser_blocks\.\d+\.{layer}" for layer in ("linear1_q", "linear1_kv", "linear2"))
    )
    first_stage = frozenset({"pose_patch_embedding"})

    @property
    def pixels(self) -> int:
        """Height and width of the face video."""
        return 4 * 2 ** (len(self.channels) - 1)

    @classmethod
    def read(cls, tensors: TensorShapes) -> Animate | None:
        """The dimensions of a file with face adapters; None for a file without."""
        if f"{_ADAPTERS}.0.k_norm.weight" not in tensors.tensors:
            return None
        shape, encoder = tensors.needed, "face_encoder"
        names = tensors.tensors
        blocks = sum(name.startswith(f"{_CONVOLUTIONS}.") and name.endswith(".skip.1.weight") for name in names)
        hidden = shape(f"{encoder}.conv2.conv.weight", 3)[0]
        outputs = [shape(f"{_CONVOLUTIONS}.{i}.skip.1.weight", 4)[0] for i in range(1, blocks + 1)]
        directions = shape("motion_encoder.dec.direction.weight", 2)
        return cls(
            pose_dim=shape("pose_patch_embedding.weight", 5)[1],
            channels=(shape(f"{_CONVOLUTIONS}.0.0.weight", 4)[0], *outputs),
            style=shape(f"{_CONVOLUTIONS}.{blocks + 1}.weight", 4)[0],
            directions=directions[1],
            motion=directions[0],
            hidden=hidden,
            heads=shape(f"{encoder}.conv1_local.conv.weight", 3)[0] // hidden,
        )

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the pose's embedding, of the face's encoders and of the adapters.

        The list leaves out the blur kernels in the file of Wan's authors, which are constants (see `is_constant`).
        """
        shapes = patch_embedding("pose_patch_embedding", self.pose_dim, config.dim)
        shapes |= self._motion_encoder_shapes()
        widths = (self.hidden, self.hidden, self.hidden)
        shapes |= causal_encoder_shapes("face_encoder", self.motion, widths, self.heads, config.dim)
        shapes |= linear("face_encoder.out_proj", self.hidden, config.dim)
        for i in range(config.num_layers // _STRIDE):
            adapter = f"{_ADAPTERS}.{i}"
            shapes |= linear(f"{adapter}.linear1_kv", config.dim, 2 * config.dim)
            shapes |= linear(f"{adapter}.linear1_q", config.dim, config.dim)
            shapes |= linear(f"{adapter}.linear2", config.dim, config.dim)
            shapes[f"{adapter}.q_norm.weight"] = shapes[f"{adapter}.k_norm.weight"] = (config.head_dim,)
        return shapes

    def _motion_encoder_shapes(self) -> Shapes:
        previous = self.channels[0]
        shapes: Shapes = {
            f"{_CONVOLUTIONS}.0.0.weight": (previous, 3, 1, 1),
            f"{_CONVOLUTIONS}.0.1.bias": (1, previous, 1, 1),
        }
        for i, channels in enumerate(self.channels[1:], 1):
            block = f"{_CONVOLUTIONS}.{i}"
            shapes[f"{block}.conv1.0.weight"] = (previous, previous, 3, 3)
            shapes[f"{block}.conv1.1.bias"] = (1, previous, 1, 1)
            shapes[f"{block}.conv2.1.weight"] = (channels, previous, 3, 3)
            shapes[f"{block}.conv2.2.bias"] = (1, channels, 1, 1)
            shapes[f"{block}.skip.1.weight"] = (channels, previous, 1, 1)
            previous = channels
        shapes[f"{_CONVOLUTIONS}.{len(self.channels)}.weight"] = (self.style, previous, 4, 4)
        for i in range(5):
            shapes |= linear(f"motion_encoder.enc.fc.{i}", self.style, self.style if i < 4 else self.directions)
        shapes["motion_encoder.dec.direction.weight"] = (self.motion, self.directions)
        return shapes

    def layers(self) -> type[AnimateModel]:
        """`AnimateModel`."""
        return AnimateModel

    def divides(self, config: WanConfig) -> bool:
        """Whether the adapters come at even distances to the last block."""
        return config.num_layers % _STRIDE == 0

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a blur kernel of the face's encoder."""
        return name.startswith("motion_encoder.") and name.endswith(".kernel")

    def block_number(self, config: WanConfig, name: str) -> int | None:
        """The number of the block behind which the adapter with the tensor `name` acts; None for other tensors."""
        part = name.split(".")
        return int(part[2]) * _STRIDE if part[0] == "face_adapter" else None

    def side_attention(self, config: WanConfig) -> SideAttention:
        """The attention to the tokens of a frame's face, behind every fifth block."""
        return SideAttention(len(range(0, config.num_layers, _STRIDE)) / config.num_layers, self.heads + 1, config.dim)


class Blur(nn.Module):
    """A fixed low-pass in front of a convolution that takes every second pixel."""

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, c, h, w] to about the same size, by the padding."""
        line = torch.tensor(_BLUR, dtype=x.dtype, device=x.device)
        kernel = torch.outer(line, line) / line.sum() ** 2
        channels = x.shape[1]
        return F.conv2d(x, kernel.expand(channels, 1, -1, -1), padding=self.padding, groups=channels)


class ScaledConvolution(nn.Module):
    """A Conv2d whose weights are held with a deviation of 1, whatever its size."""

    def __init__(self, columns: int, rows: int, size: int, **options: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, size, size), requires_grad=False)
        self.scale, self.options = 1 / math.sqrt(columns * size * size), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, columns, h, w] to [B, rows, ...], in the dtype of x."""
        return F.conv2d(x, self.weight.to(x.dtype) * self.scale, **self.options)


class ScaledLinear(nn.Module):
    """A linear layer whose weights are held with a deviation of 1."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] to [..., rows], in the dtype of x."""
        return F.linear(x, as_tensor(self.weight, x.dtype) / math.sqrt(x.shape[-1]), self.bias.to(x.dtype))


class Activation(nn.Module):
    """Adds a bias, then a leaky ReLU that keeps the deviation."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, channels, h, w] to the same shape."""
        return F.leaky_relu(x + self.bias.to(x.dtype), 0.2) * math.sqrt(2)


class HalvingBlock(nn.Module):
    """A residual block to half the height and width."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConvolution(columns, columns, 3, padding=1), Activation(columns))
        self.conv2 = nn.Sequential(Blur(2), ScaledConvolution(columns, rows, 3, stride=2), Activation(rows))
        self.skip = nn.Sequential(Blur(1), ScaledConvolution(columns, rows, 1, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, columns, h, w] to [B, rows, h/2, w/2]."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class Directions(nn.Module):
    """Sums directions of motion by their shares to one motion; the directions are made orthogonal."""

    def __init__(self, motion: int, directions: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(motion, directions), requires_grad=False)

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        """Shares [n, directions] to motions [n, motion], in float32."""
        return shares @ torch.linalg.qr(as_tensor(self.weight, torch.float32))[0].T


class FaceMotionEncoder(nn.Module):
    """Encodes face images [n, 3, pixels, pixels] in -1..1 as motions [n, motion], in float32."""

    def __init__(self, face: Animate):
        super().__init__()
        channels = face.channels
        first = nn.Sequential(ScaledConvolution(3, channels[0], 1), Activation(channels[0]))
        halving = [HalvingBlock(*pair) for pair in pairwise(channels)]
        last = ScaledConvolution(channels[-1], face.style, 4)
        rows = [face.style] * 4 + [face.directions]
        self.enc = nn.ModuleDict(
            {
                "net_app": nn.ModuleDict({"convs": nn.Sequential(first, *halving, last)}),
                "fc": nn.Sequential(*(ScaledLinear(face.style, n) for n in rows)),
            }
        )
        self.dec = nn.ModuleDict({"direction": Directions(face.motion, face.directions)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode face images [n, 3, pixels, pixels] as motions [n, motion]."""
        seen = cast(nn.ModuleDict, self.enc["net_app"])["convs"](images).flatten(1)
        return self.dec["direction"](self.enc["fc"](seen))


class FaceEncoder(CausalEncoder):
    """Encodes motions [B, t, motion] of video frames as tokens [B, ceil(t/4), heads + 1, dim] of latent frames."""

    def __init__(self, face: Animate, dim: int):
        super().__init__(face.motion, (face.hidden,) * 3, face.heads, dim)
        self.out_proj = Linear(face.hidden, dim)

    def forward(self, motions: torch.Tensor) -> torch.Tensor:
        """Encode motions [B, t, motion] as tokens [B, ceil(t/4), heads + 1, dim]."""
        return self.padded(self.out_proj(self.encode(motions, self.conv1_local, self.heads)))


class FaceAdapter(nn.Module):
    """The cross-attention of a frame's tokens to the tokens of the frame's face, behind one block."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim, self.head_dim, self.eps = config.dim, config.head_dim, config.eps
        self.linear1_kv = Linear(dim, 2 * dim)
        self.linear1_q = Linear(dim, dim)
        self.linear2 = Linear(dim, dim)
        self.q_norm = RMSNorm(self.head_dim, config.eps)
        self.k_norm = RMSNorm(self.head_dim, config.eps)

    def forward(self, x: torch.Tensor, face: torch.Tensor, runs: list[Run], dtype: torch.dtype) -> None:
        """Add the attention to the tokens `face` [B, frames, tokens, dim] to x [B, n, dim] (float32) in place."""
        k, v = self.linear1_kv(self._normed(face, dtype)).chunk(2, dim=-1)
        k, v = self._by_head(k, self.k_norm), v.unflatten(-1, (-1, self.head_dim))
        for run in runs:
            q = self._by_head(self.linear1_q(self._normed(run.of(x), dtype)), self.q_norm)
            y = self.linear2(few_keys(q, run.own(k), run.own(v)).flatten(2))
            pointwise.add_(x[:, run.tokens], run.back(y))

    def _normed(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(dtype)

    def _by_head(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """x [..., heads * head_dim] as [..., heads, head_dim], each head of it normed."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        return norm(x.reshape(1, -1, self.head_dim)).view(shape)


class AnimateModel(WanModel):
    """The DiT of Animate."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        face = config[Animate]
        self.pose_patch_embedding = PatchEmbedding(face.pose_dim, config.dim)
        self.motion_encoder = FaceMotionEncoder(face)
        self.face_encoder = FaceEncoder(face, config.dim)
        adapters = (FaceAdapter(config) for _ in range(config.num_layers // _STRIDE))
        self.face_adapter = nn.ModuleDict({"fuser_blocks": nn.ModuleList(adapters)})

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens `video` with the pose of their frames; the first frame, the reference image, has no pose."""
        x = super().embed_video(tokens, grid, video, conditioning)
        if conditioning.pose is not None:
            pose = patchify(pad_to_patch(conditioning.pose.to(x.device, torch.float32)))
            places = torch.arange(grid.tokens, device=x.device)[video] - grid.frame_tokens
            posed = (places >= 0) & (places < pose.shape[1])
            x[:, posed] += self.pose_patch_embedding(pose[:, places[posed]])
        return x

    def side_streams(
        self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning, carried: list[torch.Tensor]
    ) -> Sides:
        """The tokens of the face [B, frames, tokens, dim], and the runs by frames of the video tokens `part`."""
        sides, video = super().side_streams(x, grid, part, conditioning, carried), conditioning.face
        if video is None:
            return sides
        face = conditioning.once("face", lambda: self._face_tokens(video, x.device))
        missing = grid.frames - face.shape[1]
        face = F.pad(face, (0, 0, 0, 0, 0, missing)) if missing > 0 else face[:, : grid.frames]
        return sides | {"face": (face, runs_of(part, grid.frame_tokens, grid.frames))}

    def add_sides(
        self, x: torch.Tensor, sides: Sides, block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        """Add, behind every fifth block, each token's attention to the face of its frame."""
        super().add_sides(x, sides, block, inputs, conditioning)
        if "face" in sides and block % _STRIDE == 0:
            adapter = cast(nn.ModuleList, self.face_adapter["fuser_blocks"])[block // _STRIDE]
            adapter(x, *sides["face"], inputs.compute_dtype)

    def _face_tokens(self, video: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Encode a face video [B, 3, t, pixels, pixels] as [B, 1 + ceil(t/4), tokens, dim]; frame 0 has zeros."""
        images = video.transpose(1, 2).flatten(0, 1)
        motions = [self.motion_encoder(some.to(device, torch.float32)) for some in images.split(_AT_ONCE)]
        tokens = self.face_encoder(torch.cat(motions).unflatten(0, (len(video), -1)))
        return F.pad(tokens, (0, 0, 0, 0, 1, 0))
