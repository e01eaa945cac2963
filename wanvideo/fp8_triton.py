"""Rounding to fp8 as Triton kernels: one pass over memory. See fp8.py and fp8_attention.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FP8 = torch.float8_e4m3fn
_CHUNK, _ROWS, _STEPS = 1024, 32, 4


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
def _finish_kernel(
    largest, sums, mean, scale, inverse, n, chunks,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head, heads, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    columns = tl.arange(0, D)
    greatest, total = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)[:, None]
        at = ((batch * chunks + chunk) * heads + head) * D + columns[None, :]
        greatest = tl.maximum(greatest, tl.load(largest + at, mask=chunk < chunks, other=0.0))
        if SMOOTH:
            total += tl.load(sums + at, mask=chunk < chunks, other=0.0)
    top = tl.max(tl.max(greatest, 0), 0)
    if SMOOTH:
        middle = tl.sum(total, 0) / n
        tl.store(mean + (batch * heads + head) * D + columns, middle)
        top += tl.max(tl.abs(middle), 0)
    unit, reciprocal = power_of_two(top)
    tl.store(scale + batch * heads + head, unit)
    tl.store(inverse + batch * heads + head, reciprocal)


@triton.jit
def _heads_kernel(
    x, mean, inverse, out, rounded, n, x_batch, x_token, x_head,
    STEPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SMOOTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    columns = tl.arange(0, D)
    reciprocal = tl.load(inverse + batch * heads + head)
    if SMOOTH:
        middle = tl.load(mean + (batch * heads + head) * D + columns)[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    for step in range(STEPS):
        token = ((chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = x + batch * x_batch + token * x_token + head * x_head + columns[None, :]
        values = tl.load(at, mask=token < n, other=0.0).to(tl.float32)
        if SMOOTH:
            values -= middle
        small = (values * reciprocal).to(out.dtype.element_ty)
        if SUM:
            total += tl.where(token < n, small.to(tl.float32), 0.0)
        tl.store(out + ((batch * n + token) * heads + head) * D + columns[None, :], small, mask=token < n)
    if SUM:
        at = ((batch * tl.num_programs(0) + chunk) * heads + head) * D + columns
        tl.store(rounded + at, tl.sum(total, 0))


def to_rows(x: torch.Tensor, gelu: bool = False, dtype: torch.dtype = _FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.to_rows`: numbers [..., d] in `dtype`, scales [..., 1]."""
    x, d = x.contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(d)
        _rows_kernel[(x.numel() // d,)](x, out, scales, d, block, gelu, num_warps=min(16, max(1, block // 512)))
    return out, scales


def to_heads(
    x: torch.Tensor, smooth: bool, unbiased: bool, dtype: torch.dtype = _FP8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `fp8_attention.to_heads`: numbers in `dtype`, scales, mean. Any strides but the last; D a power of 2."""
    batch, n, heads, d = x.shape
    chunks, strides = triton.cdiv(n, _CHUNK), x.stride()[:3]
    largest, sums = torch.empty(2, batch, chunks, heads, d, device=x.device).unbind(0)
    _extent_kernel[(chunks, heads, batch)](x, largest, sums, n, *strides, _CHUNK, _ROWS, d, num_warps=4)
    mean = torch.empty(batch, heads, d, device=x.device)
    scale, inverse = torch.empty(2, batch, heads, device=x.device).unbind(0)
    _finish_kernel[(heads, batch)](largest, sums, mean, scale, inverse, n, chunks, smooth, 16, d)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    runs = triton.cdiv(n, 2 * _ROWS * _STEPS)
    rounded = torch.empty(batch, runs, heads, d, device=x.device) if unbiased else sums
    _heads_kernel[(runs, heads, batch)](
        x, mean, inverse, out, rounded, n, *strides, _STEPS, 2 * _ROWS, d, smooth, unbiased, num_warps=8
    )
    if unbiased:
        mean -= rounded.sum(1) * (scale / n)[..., None]
    return out, scale, mean if smooth else None
