"""Wan 2.2 Animate: an image-to-video model that is led by a pose video and by a face video.

The pose is added to the token embedding, one frame later than its own (the first frame is the reference image). The
face is described by directions of motion, each four frames of which become a few tokens; behind every fifth block the
tokens of a frame attend to those of its face. Both act on any part of the tokens.

Sources: Wan 2.2 `wan/modules/animate/`; the face's encoder is that of LIA (arXiv 2203.09043) with StyleGAN2's blocks.
Shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part, pad_to_patch, patchify
from ..base.variant_shapes import FACE_STRIDE, FaceDims
from ..model.layers import BlockInputs, Linear, PatchEmbedding, RMSNorm
from ..ops import pointwise
from ..quant.quantized import as_tensor
from .frames import CausalEncoder, Run, few_keys, runs_of
from .variant_model import VariantModel

_BLUR = (1.0, 3.0, 3.0, 1.0)
_AT_ONCE = 2  # face images that the encoder takes at once: 0.3 GB of activations


class Blur(nn.Module):
    """A fixed low-pass in front of a convolution that takes every second pixel."""

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        line = torch.tensor(_BLUR, dtype=x.dtype, device=x.device)
        kernel = torch.outer(line, line) / line.sum() ** 2
        channels = x.shape[1]
        return F.conv2d(x, kernel.expand(channels, 1, -1, -1), padding=self.padding, groups=channels)


class ScaledConvolution(nn.Module):
    """A Conv2d whose weights are held with a deviation of 1, whatever its size."""

    def __init__(self, columns: int, rows: int, size: int, **options: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, size, size), requires_grad=False)
        self.scale, self.options = 1 / math.sqrt(columns * size * size), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.to(x.dtype) * self.scale, **self.options)


class ScaledLinear(nn.Module):
    """A linear layer whose weights are held with a deviation of 1."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, as_tensor(self.weight, x.dtype) / math.sqrt(x.shape[-1]), self.bias.to(x.dtype))


class Activation(nn.Module):
    """Adds a bias, then a leaky ReLU that keeps the deviation."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x + self.bias.to(x.dtype), 0.2) * math.sqrt(2)


class HalvingBlock(nn.Module):
    """A residual block to half the height and width."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConvolution(columns, columns, 3, padding=1), Activation(columns))
        self.conv2 = nn.Sequential(Blur(2), ScaledConvolution(columns, rows, 3, stride=2), Activation(rows))
        self.skip = nn.Sequential(Blur(1), ScaledConvolution(columns, rows, 1, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class Directions(nn.Module):
    """Shares of the directions of motion to a motion; the directions are made orthogonal."""

    def __init__(self, motion: int, directions: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(motion, directions), requires_grad=False)

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        return shares @ torch.linalg.qr(as_tensor(self.weight, torch.float32))[0].T


class MotionEncoder(nn.Module):
    """Face images [n, 3, pixels, pixels] in -1..1 to their motion [n, motion], in float32."""

    def __init__(self, face: FaceDims):
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
        seen = self.enc["net_app"]["convs"](images).flatten(1)
        return self.dec["direction"](self.enc["fc"](seen))


class FaceEncoder(CausalEncoder):
    """The motions of the video's frames [B, t, motion] to tokens [B, ceil(t/4), heads + 1, dim] of latent frames."""

    def __init__(self, face: FaceDims, dim: int):
        super().__init__(face.motion, (face.hidden,) * 3, face.heads, dim)
        self.out_proj = Linear(face.hidden, dim)

    def forward(self, motions: torch.Tensor) -> torch.Tensor:
        return self.padded(self.out_proj(self.encode(motions, self.conv1_local, self.heads)))


class FaceAdapter(nn.Module):
    """What the video gets from the face behind one block: cross-attention of a frame's tokens to those of its face."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim, self.head_dim, self.eps = config.dim, config.head_dim, config.eps
        self.linear1_kv = Linear(dim, 2 * dim)
        self.linear1_q = Linear(dim, dim)
        self.linear2 = Linear(dim, dim)
        self.q_norm = RMSNorm(self.head_dim, config.eps)
        self.k_norm = RMSNorm(self.head_dim, config.eps)

    def forward(self, x: torch.Tensor, face: torch.Tensor, runs: list[Run], dtype: torch.dtype) -> None:
        """Change x [B, n, dim] (float32) in place by the tokens `face` [B, frames, tokens, dim] of all frames."""
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


class AnimateModel(VariantModel):
    """The DiT of Animate."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        face = config.face
        self.pose_patch_embedding = PatchEmbedding(face.pose_dim, config.dim)
        self.motion_encoder = MotionEncoder(face)
        self.face_encoder = FaceEncoder(face, config.dim)
        adapters = (FaceAdapter(config) for _ in range(config.num_layers // FACE_STRIDE))
        self.face_adapter = nn.ModuleDict({"fuser_blocks": nn.ModuleList(adapters)})

    def embed(self, tokens: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> torch.Tensor:
        x = super().embed(tokens, grid, part, conditioning)
        if conditioning.pose is not None:
            pose = patchify(pad_to_patch(conditioning.pose.to(x.device, torch.float32)))
            places = torch.arange(grid.tokens, device=x.device)[part] - grid.frame_tokens
            led = (places >= 0) & (places < pose.shape[1])
            x[:, led] += self.pose_patch_embedding(pose[:, places[led]])
        return x

    def side_streams(self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> list[Any]:
        """The tokens of the face [B, frames, tokens, dim], and where this part's tokens lie in the frames."""
        if conditioning.face is None:
            return []
        face = conditioning.once("face", lambda: self._face_tokens(conditioning.face, x.device))
        missing = grid.frames - face.shape[1]
        face = F.pad(face, (0, 0, 0, 0, 0, missing)) if missing > 0 else face[:, : grid.frames]
        return [face, runs_of(part, grid.frame_tokens, grid.frames)]

    def add_sides(
        self, x: torch.Tensor, sides: list[Any], block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        if sides and block % FACE_STRIDE == 0:
            adapter = self.face_adapter["fuser_blocks"][block // FACE_STRIDE]
            adapter(x, *sides, inputs.compute_dtype)

    def _face_tokens(self, video: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Face video [B, 3, t, pixels, pixels] to tokens [B, 1 + ceil(t/4), tokens, dim]; none for the reference."""
        images = video.transpose(1, 2).flatten(0, 1)
        motions = [self.motion_encoder(some.to(device, torch.float32)) for some in images.split(_AT_ONCE)]
        tokens = self.face_encoder(torch.cat(motions).unflatten(0, (len(video), -1)))
        return F.pad(tokens, (0, 0, 0, 0, 1, 0))
