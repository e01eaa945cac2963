"""Attention heads dealt out to several tensors, and put together again.

In one pass by Triton where that can be used (`pointwise.use_triton`); torch's copies of a part of the heads reach half
of the memory's speed, and there are many of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch

from ..wanvideo.pointwise import triton_in_use


def scatter_heads(x: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copy x [B, n, heads, head_dim] to `parts`, each [n, B, some heads, head_dim] and contiguous, in their order."""
    if _in_one_pass(x):
        _kernels().scatter(x.contiguous(), parts)
        return
    heads = x.transpose(0, 1).split([part.shape[2] for part in parts], dim=2)
    for part, some in zip(parts, heads, strict=True):
        part.copy_(some)


def gather_heads(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """The way back: `parts`, of all heads in their order, to a contiguous `out` [B, n, heads, head_dim]."""
    if _in_one_pass(out):
        _kernels().gather(parts, out)
        return
    heads = out.transpose(0, 1).split([part.shape[2] for part in parts], dim=2)
    for part, some in zip(parts, heads, strict=True):
        some.copy_(part)


def _in_one_pass(x: torch.Tensor) -> bool:
    return x.is_cuda and triton_in_use()


@functools.cache
def _kernels() -> ModuleType:
    """Those of Triton, once it is known to work."""
    return import_module(".heads_triton", __package__)
