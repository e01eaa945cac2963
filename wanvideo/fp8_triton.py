"""Rounding to fp8 as Triton kernels: one pass over memory. See fp8.py and fp8_attention.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FP8 = torch.float8_e4m3fn
_CHUNK, _ROWS = 1024, 32


@triton.jit
def power_of_two(largest):
    """The scale of numbers up to `largest`, and its reciprocal, both exact; the constants are those of fp8.py."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 27)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows_kernel(x, out, scales, d, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    values = tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # x * sigmoid(2 z) is x / 2 * (1 + tanh z)
        z = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        values = values / (1.0 + tl.exp(-2.0 * z))
    scale, inverse = power_of_two(tl.max(tl.abs(values), 0))
    tl.store(out + row * d + columns, (values * inverse).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _extent_kernel(
    x, largest, sums, n, x_batch, x_token, x_head,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, D)
    greatest, total = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in range(0, CHUNK, ROWS):
        token = (chunk * CHUNK + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = x + batch * x_batch + token * x_token + head * x_head + columns[None, :]
        values = tl.load(at, mask=token < n, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.abs(values))
        total += values
    at = ((batch * tl.num_programs(0) + chunk) * tl.num_programs(1) + head) * D + columns
    tl.store(largest + at, tl.max(greatest, 0))
    tl.store(sums + at, tl.sum(total, 0))


@triton.jit
def _heads_kernel(
    x, mean, inverse, out, n, x_batch, x_token, x_head,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, D)
    of_head = batch * HEADS + head
    at = x + batch * x_batch + token * x_token + head * x_head + columns[None, :]
    values = tl.load(at, mask=token < n, other=0.0).to(tl.float32)
    if SMOOTH:
        values -= tl.load(mean + of_head * D + columns).to(tl.float32)[None, :]
    values *= tl.load(inverse + of_head)
    at = out + ((batch * n + token) * HEADS + head) * D + columns[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=token < n)


def to_rows(x: torch.Tensor, gelu: bool = False, dtype: torch.dtype = _FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.to_rows`: numbers [..., d] in `dtype`, scales [..., 1]."""
    x, d = x.contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(d)
        _rows_kernel[(x.numel() // d,)](x, out, scales, d, block, gelu, num_warps=min(16, max(1, block // 512)))
    return out, scales


def extent(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8_attention.extent`; D a power of 2."""
    batch, n, heads, d = x.shape
    chunks = triton.cdiv(n, _CHUNK)
    largest, sums = (torch.empty(batch, chunks, heads, d, device=x.device) for _ in range(2))
    _extent_kernel[(chunks, heads, batch)](x, largest, sums, n, *x.stride()[:3], _CHUNK, _ROWS, d, num_warps=4)
    return largest.amax((1, 3)), sums.sum(1) / n


def heads(
    x: torch.Tensor, mean: torch.Tensor | None, inverse: torch.Tensor, dtype: torch.dtype = _FP8
) -> torch.Tensor:
    """(x - mean) * inverse in `dtype`: x [B, n, H, D] of any strides but the last, mean [B, H, D], inverse [B, H]."""
    batch, n, count, d = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    smooth = mean is not None
    _heads_kernel[(triton.cdiv(n, 2 * _ROWS), count, batch)](
        x, mean.contiguous() if smooth else x, inverse.contiguous(), out, n, *x.stride()[:3],
        count, 2 * _ROWS, d, smooth, num_warps=8,
    )  # fmt: skip
    return out
