"""Self-attention on float8 e4m3: FlashAttention-3's kernel on Hopper, and what it computes in plain torch elsewhere.

Queries, keys and values get one scale for each head. The mean over the tokens is taken off the keys first, which
moves all scores of a query by the same and so changes nothing in the softmax, and off the values, which is added to the
output again: what all tokens have in common then loses nothing by rounding (SageAttention, arXiv 2410.02367 and
2411.10958). Each call smooths the keys that it is given, so that a ring's blocks can be merged, and the heads that an
exchange has brought.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import fp8

_QUERIES = 256
"""How many rows of scores the reference has in memory at once."""
_P_SCALE = 256.0
"""By which FlashAttention-3 multiplies the exponentials, 1 at most, before it rounds them."""


@dataclass(frozen=True, eq=False)
class Fp8Heads:
    """data * scale + mean: e4m3 [B, n, H, D], float32 [B, H], and [B, H, D] in the dtype of what was rounded."""

    data: Tensor
    scale: Tensor
    mean: Tensor | None

    def float(self) -> Tensor:
        """Without the mean."""
        return self.data.float() * self.scale[:, None, :, None]


def to_heads(x: Tensor, smooth: bool = False) -> Fp8Heads:
    """Round x [B, n, H, D] with one scale for each head; `smooth` takes the mean over the tokens off before."""
    largest, mean = extent(x)
    if smooth:
        mean = mean.to(x.dtype)
        largest = largest + mean.abs().amax(-1).float()
    scale = fp8.power_of_two(largest)
    kernels = _kernels(x)
    if kernels:
        data = kernels.heads(x, mean if smooth else None, scale.reciprocal())
    else:
        values = x.float() - mean.float()[:, None] if smooth else x.float()
        data = (values / scale[:, None, :, None]).to(fp8.FP8)
    return Fp8Heads(data, scale, mean if smooth else None)


def extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest size of each head of x [B, n, H, D], float32 [B, H], and the mean over tokens, float32 [B, H, D]."""
    if kernels := _kernels(x):
        return kernels.extent(x)
    return x.abs().amax((1, 3)).float(), x.mean(1, dtype=torch.float32)


def load_flash_attn_3(module: str) -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    """The fp8 forward of an installed FlashAttention-3."""
    func = importlib.import_module(module).flash_attn_func

    def forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        q8, k8, v8 = to_heads(q), to_heads(k, smooth=True), to_heads(v, smooth=True)
        scales = {"q_descale": q8.scale, "k_descale": k8.scale, "v_descale": v8.scale}
        result = func(q8.data, k8.data, v8.data, **scales, **({"return_attn_probs": True} if want_lse else {}))
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        out = out.add_(v8.mean[:, None]).to(q.dtype)
        return out, lse + _taken_off(q, k8.mean) if want_lse else None

    return forward


def reference(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """What FlashAttention-3 computes, exponentials in e4m3 included, with float32 sums: for tests on a CPU."""
    q8, k8, v8 = to_heads(q), to_heads(k, smooth=True), to_heads(v, smooth=True)
    keys, values = k8.float(), v8.float()
    outs, sums = [], []
    for part in q8.float().split(_QUERIES, dim=1):
        scores = torch.einsum("bqhd,bkhd->bhqk", part, keys) / math.sqrt(q.shape[-1])
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp_()
        total = weights.sum(-1, keepdim=True)
        rounded = (weights * _P_SCALE).to(fp8.FP8).float() / _P_SCALE
        outs.append(torch.einsum("bhqk,bkhd->bqhd", rounded / total, values))
        sums.append((largest + total.log()).squeeze(-1))
    out = (torch.cat(outs, dim=1) + v8.mean[:, None].float()).to(q.dtype)
    return out, torch.cat(sums, dim=-1) + _taken_off(q, k8.mean) if want_lse else None


def _taken_off(q: Tensor, mean: Tensor) -> Tensor:
    """By how much smoothing of the keys has lowered the scores of each query, [B, H, n] in float32."""
    return torch.einsum("bqhd,bhd->bhq", q.float(), mean.float()) / math.sqrt(q.shape[-1])


def _kernels(x: Tensor) -> ModuleType | None:
    usable = x.stride(-1) == 1 and x.shape[-1] & (x.shape[-1] - 1) == 0
    return fp8.fused(x.device) if usable else None
