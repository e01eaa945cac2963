"""WanDancer: music is added to the tokens behind some of the blocks.

Its attention to the music has one key for each stretch of tokens, so that it gives that key's value whatever the
query is: a vector for each stretch, which each block's injector computes once.

The model makes a coarse video at less than 30 frames a second with an embedding, a head and positions of their own,
and fills it in at 30 with the usual ones.

Source: Wan-Dancer as ComfyUI runs it (`comfy/ldm/wan/model_wandancer.py`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..base.audio_shapes import DancerMusic
from ..base.config import WanConfig
from ..base.grid import Grid, Part
from ..model.layers import Attention, LayerNorm, Linear
from ..ops.rope import THETA, apply_rope

HEADS = 4  # of the music's transformer; nothing in a file tells it
NORM_EPS = 1e-5
PER_FRAME = 8  # stretches of tokens in a latent frame, each with a moment of music


class MusicAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = (project(x).unflatten(-1, (HEADS, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MusicLayer(nn.Module):
    def __init__(self, music: DancerMusic):
        super().__init__()
        self.self_attn = MusicAttention(music.width)
        self.linear1, self.linear2 = Linear(music.width, music.hidden), Linear(music.hidden, music.width)
        self.norm1, self.norm2 = LayerNorm(music.width, NORM_EPS), LayerNorm(music.width, NORM_EPS)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm1(x, x.dtype), rope)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x, x.dtype))))


class MusicInjector(nn.Module):
    """An attention for each of the video's blocks that music is added behind; only values and outputs are used."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.injector = nn.ModuleList(Attention(config) for _ in range(config.music.injectors))


def encode_music(
    features: torch.Tensor, projection: Linear, layers: nn.ModuleList, grid: Grid, dim: int
) -> torch.Tensor:
    """Music features [B, moments, features] to float32 [B, frames * PER_FRAME, dim] of a video's latent frames."""
    x = projection(features.float())
    pairs = x.shape[-1] // HEADS // 2
    frequencies = THETA ** -(torch.arange(pairs, dtype=torch.float64, device=x.device) / pairs)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64, device=x.device), frequencies)
    rope = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    for layer in layers:
        x = layer(x, rope)
    return F.interpolate(x.unsqueeze(1), (grid.frames * PER_FRAME, dim), mode="bilinear").squeeze(1)


def add_music(
    x: torch.Tensor, music: torch.Tensor, places: torch.Tensor, injector: Attention, scale: float, dtype: torch.dtype
) -> None:
    """Change tokens x [B, n, dim] in place by the music [B, moments, dim] of the moments `places` [n]."""
    heard = injector.o(injector.v(music.to(dtype))).float()
    x += scale * heard[:, places]


def moment_of(grid: Grid, part: Part, device: torch.device) -> torch.Tensor:
    """The moment of music that each token of `part` hears."""
    return torch.arange(grid.tokens, device=device)[part] * (grid.frames * PER_FRAME) // grid.tokens
