"""The Wan DiT of wanvideo/ once more, for training: same names, same numbers, with gradients.

The model of the pack changes its residual stream in place, which autograd cannot undo. This one does not, and it
spares most of the text's work: the slots behind a caption are all alike, so one of them stands for all, with the
logarithm of their number added to its attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import Grid, grid_of, patchify, unpatchify
from ...wanvideo.example.tiny_text import TEXT_LENGTH
from ...wanvideo.model.layers import sinusoid
from ...wanvideo.ops.rope import rope_table

CONFIG = WanConfig(dim=512, ffn_dim=768, num_heads=4, num_layers=4)


class Linear(nn.Linear):
    """In the dtype of its input, as in wanvideo/model/layers.py."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Norm(nn.Module):
    """Root-mean-square norm over the full width; float32 out."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = Norm(config.dim, config.eps), Norm(config.dim, config.eps)

    def forward(
        self,
        x: torch.Tensor,
        source: torch.Tensor,
        rope: Rotation | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries of x [B, n, dim], keys and values of source; bias is added to the scores [B, 1, 1, m]."""
        q, k = self.by_head(self.norm_q(self.q(x))), self.by_head(self.norm_k(self.k(source)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        v = self.by_head(self.v(source))
        q, k, v = (t.to(x.dtype).transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))


Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of each token and pair, [n, 1, head_dim/2]."""


def rotation(grid: Grid, head_dim: int, device: torch.device) -> Rotation:
    table = rope_table(grid.shape, head_dim, device)
    return table.real[:, None].contiguous(), table.imag[:, None].contiguous()


def rotate(x: torch.Tensor, rope: Rotation) -> torch.Tensor:
    """What wanvideo.ops.rope.apply_rope does, without complex numbers, which torch.compile leaves alone."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def modulate(x: torch.Tensor, eps: float, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim),
        )

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor, bias: torch.Tensor, cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        dtype = text.dtype
        modulation = (time + self.modulation).unsqueeze(2)  # [B, 6, 1, dim]
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(1)
        y = modulate(x, self.eps, shift, scale).to(dtype)
        x = x + self.self_attn(y, y, (cos, sin)).float() * gate
        x = x + self.cross_attn(self.norm3(x).to(dtype), text, bias=bias).float()
        return x + self.ffn(modulate(x, self.eps, shift_ffn, scale_ffn).to(dtype)).float() * gate_ffn


class PatchEmbedding(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.dim, config.in_dim, 1, 2, 2))
        self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))
        self.head = Linear(config.dim, 4 * config.out_dim)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale = (embedding.unsqueeze(1) + self.modulation).unsqueeze(2).unbind(1)
        return self.head(modulate(x, self.eps, shift, scale))


class TrainableWan(nn.Module):
    """Args:
    config: dimensions.
    compute_dtype: of matrix products and attention; parameters and the residual stream are float32.
    """

    def __init__(self, config: WanConfig = CONFIG, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        d = config.dim
        self.patch_embedding = PatchEmbedding(config)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, d), nn.GELU(approximate="tanh"), Linear(d, d))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, d), nn.SiLU(), Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.block_calls: list[Callable[..., torch.Tensor]] = list(self.blocks)
        self._initialise()

    def compile_blocks(self, on: bool) -> None:
        """Run the blocks through torch.compile from now on, or not; they are alike, so it compiles one."""
        self.block_calls = [torch.compile(block) if on else block for block in self.blocks]

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Predict the velocity.

        Args:
            x: latent [B, in_dim, T, H, W], H and W even.
            timestep: sigma * 1000, [B].
            words: vectors of the captions' words [B, L, text_dim]; what lies behind a caption's end is ignored.
            counts: number of words of each caption [B], at most L.

        Returns:
            float32 [B, out_dim, T, H, W].
        """
        grid = grid_of(x)
        embedding = self.time_embedding(sinusoid(timestep, self.config.freq_dim))
        time = self.time_projection(embedding).unflatten(-1, (6, -1))
        text, bias = self.text(words, counts)
        cos, sin = rotation(grid, self.config.head_dim, x.device)
        tokens = self.patch_embedding(patchify(x.float().contiguous()))
        for block in self.block_calls:
            tokens = block(tokens, time, text, bias, cos, sin)
        return unpatchify(self.head(tokens, embedding), grid, tuple(x.shape[-3:]))

    def text(self, words: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded words and one empty slot, [B, L+1, dim], and what to add to their scores, [B, 1, 1, L+1]."""
        length = words.shape[1]
        slots = F.pad(words.to(self.compute_dtype), (0, 0, 0, 1))
        place = torch.arange(length, device=words.device)
        bias = torch.zeros(len(words), length + 1, device=words.device)
        bias[:, :length].masked_fill_(place >= counts[:, None], -math.inf)
        bias[:, length] = (TEXT_LENGTH - counts.float()).log()
        return self.text_embedding(slots), bias.to(self.compute_dtype)[:, None, None]

    @torch.no_grad()
    def _initialise(self) -> None:
        """As Wan starts: Xavier for matrices, deviation 0.02 for the embeddings, a head of zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.view(self.config.dim, -1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
