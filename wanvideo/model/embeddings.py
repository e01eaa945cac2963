"""Embeddings of images: a network for CLIP tokens, and a convolution for latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .layers import Linear


class ImageEmbedding(nn.Module):
    """Embeds CLIP tokens [B, n, width] as tokens [B, n, dim] for cross-attention.

    Args:
        width: numbers of a CLIP token.
        dim: width of the model.
        positions: how many tokens have a learned position; 0 for none.
    """

    def __init__(self, width: int, dim: int, positions: int = 0):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(width), Linear(width, width), nn.GELU(), Linear(width, dim), nn.LayerNorm(dim)
        )
        if positions:
            self.emb_pos = nn.Parameter(torch.empty(1, positions, width), requires_grad=False)

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embed CLIP tokens [B, n, width] as [B, n, dim]: norms in float32, products and result in `dtype`."""
        norm_in, up, gelu, down, norm_out = self.proj
        tokens = tokens.float()
        if hasattr(self, "emb_pos"):  # with one image of two, its tokens take the first half
            tokens = tokens[:, : self.emb_pos.shape[1]] + self.emb_pos[:, : tokens.shape[1]]
        y = down(gelu(up(norm_in(tokens).to(dtype))))
        return norm_out(y.float()).to(dtype)


class Convolution(nn.Module):
    """A Conv2d that computes in the dtype of its input, whatever the dtype of the weights."""

    def __init__(self, columns: int, rows: int, size: int, **options: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, size, size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, columns, height, width] to [B, rows, ...]."""
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), **self.options)
