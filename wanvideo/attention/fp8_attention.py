"""Self-attention on float8 e4m3: FlashAttention-3's kernel on Hopper, the same arithmetic in plain torch elsewhere.

Queries, keys and values get one scale for each head. Before rounding, the mean over the tokens is subtracted from the
keys, which shifts all scores of a query by the same number and so leaves the softmax unchanged. The mean is subtracted
from the values too, and added to the output again. So the part that all tokens have in common loses nothing by rounding
(SageAttention, arXiv 2410.02367 and 2411.10958). Without this smoothing, sums of values that are not around 0 also
outgrow Hopper's fp8 accumulators, whose low bits are cut off: with a mean of twice the deviation the output has an
error of 3 % after 2,048 keys and of 55 % after 75,600; smoothing makes it 0.1 % (H200, 2026-11-21). Each call smooths
its own keys and values, which need not be all keys (as in a ring) or all heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..quant import fp8_linear
from . import flash3

_QUERIES = 256
"""The number of rows of scores that the reference has in memory at once."""
_P_SCALE = 256.0
"""The factor by which FlashAttention-3 multiplies the exponentials, which are at most 1, before rounding them."""


@dataclass(frozen=True, eq=False)
class Fp8Heads:
    """data * scale: `data` e4m3 [B, n, H, D], `scale` float32 [B, H]."""

    data: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """data * scale in float32 [B, n, H, D]."""
        return self.data.float() * self.scale[:, None, :, None]


@dataclass(frozen=True, eq=False)
class SmoothedHeads(Fp8Heads):
    """data * scale + mean: `mean` float32 [B, H, D] was taken off all tokens before they were rounded."""

    mean: Tensor


def to_heads(x: Tensor) -> Fp8Heads:
    """Round x [B, n, H, D] to nearest with one scale for each head."""
    if kernels := _fused(x):
        data, scale, _ = kernels.to_heads(x, smooth=False)
        return Fp8Heads(data, scale)
    values = x.float()
    scale = fp8_linear.power_of_two(values.abs().amax((1, 3)))
    return Fp8Heads((values / scale[:, None, :, None]).to(fp8_linear.FP8), scale)


def to_smoothed_heads(x: Tensor, unbiased: bool = False) -> SmoothedHeads:
    """Take the mean over the tokens off x [B, n, H, D], and round to nearest with one scale for each head.

    Args:
        unbiased: whether to correct `mean` after rounding, so that data * scale + mean has the mean of x. Rounding has
            a bias: one 16-bit number in 16 lies halfway between two e4m3 numbers, and once a mean is subtracted all of
            these round the same way. Attention over many tokens gives about the mean, next to which the bias is large.
    """
    kernels = _fused(x)
    if kernels:
        data, scale, mean = kernels.to_heads(x, smooth=True)
    else:
        values = x.float()
        mean = values.mean(1)
        scale = fp8_linear.power_of_two(values.abs().amax((1, 3)) + mean.abs().amax(-1))
        data = ((values - mean[:, None]) / scale[:, None, :, None]).to(fp8_linear.FP8)
    if unbiased:  # in a pass of its own: in the kernel that rounds them, half of the sums were NaN with Triton 3.6
        sums = kernels.sum_heads(data) if kernels else data.bfloat16().sum(1, dtype=torch.float32)
        mean = mean - sums * (scale / x.shape[1])[..., None]
    return SmoothedHeads(data, scale, mean)


def add_mean_(out: Tensor, mean: Tensor) -> Tensor:
    """Add mean [B, H, D] in float32 to every token of out [B, n, H, D], in place."""
    if kernels := _fused(out):
        return kernels.add_mean_(out, mean)
    return out.add_(mean[:, None].to(out.dtype))  # of two dtypes it would be twice as slow


def _fused(x: Tensor) -> ModuleType | None:
    """Triton's kernels for heads like those of x; None where no kernel takes such heads."""
    fits = x.stride(-1) == 1 and x.shape[-1] & (x.shape[-1] - 1) == 0
    return fp8_linear.fused(x.device) if fits else None


def _rounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Fp8Heads, SmoothedHeads, SmoothedHeads]:
    return to_heads(q), to_smoothed_heads(k), to_smoothed_heads(v, unbiased=True)


def load_flash_attn_3() -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    """The fp8 forward of an installed FlashAttention-3."""
    call = flash3.load()

    def forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        q8, k8, v8 = _rounded(q, k, v)
        out, lse = call(q8.data, k8.data, v8.data, q_descale=q8.scale, k_descale=k8.scale, v_descale=v8.scale)
        return add_mean_(out, v8.mean).to(q.dtype), lse + _taken_off(q, k8.mean) if want_lse else None

    return forward


def reference(q: Tensor, k: Tensor, v: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Compute as FlashAttention-3 does, with exponentials in e4m3, but with float32 sums: for tests on a CPU."""
    q8, k8, v8 = _rounded(q, k, v)
    keys, values = k8.dequantize(), v8.dequantize()
    outs, sums = [], []
    for part in q8.dequantize().split(_QUERIES, dim=1):
        scores = torch.einsum("bqhd,bkhd->bhqk", part, keys) / math.sqrt(q.shape[-1])
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp_()
        total = weights.sum(-1, keepdim=True)
        rounded = (weights * _P_SCALE).to(fp8_linear.FP8).float() / _P_SCALE
        outs.append(torch.einsum("bhqk,bkhd->bqhd", rounded / total, values))
        sums.append((largest + total.log()).squeeze(-1))
    out = (torch.cat(outs, dim=1) + v8.mean[:, None]).to(q.dtype)
    return out, torch.cat(sums, dim=-1) + _taken_off(q, k8.mean) if want_lse else None


def _taken_off(q: Tensor, mean: Tensor) -> Tensor:
    """The amount [B, H, n], in float32, by which smoothing the keys has lowered the scores of each query."""
    return torch.einsum("bqhd,bhd->bhq", q.float(), mean) / math.sqrt(q.shape[-1])
