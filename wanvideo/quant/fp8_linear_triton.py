"""Rounding to fp8 as Triton kernels: one pass over memory. See fp8_linear.py and fp8_attention.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FP8 = torch.float8_e4m3fn
_CHUNK, _ROWS, _STEPS = 1024, 64, 4


@triton.jit
def power_of_two(largest):
    """The scale of numbers up to `largest`, and its reciprocal, both exact; fp8_linear.py explains the constants."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 27)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


# Rows of 5120 or 1536 numbers lie in two blocks, of which the first is full: rows of 8192 lanes would take so many
# registers that a multiprocessor has one row in flight, too little for its share of the memory's bandwidth.


@triton.jit
def _rows_kernel(x, out, scales, d, FULL: tl.constexpr, REST: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, tail = tl.arange(0, FULL), FULL + tl.arange(0, REST)
    inside = tail < d
    a = tl.load(x + row * d + head).to(tl.float32)
    b = tl.load(x + row * d + tail, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        a, b = _gelu(a), _gelu(b)
    _store_rows(a, b, out + row * d, scales + row, head, tail, inside)


@triton.jit
def _norm_rows_kernel(
    x, scale, shift, out, scales, n, d, eps,
    x_batch, x_token, scale_batch, scale_token, shift_batch, shift_token,
    FULL: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    head, tail = tl.arange(0, FULL), FULL + tl.arange(0, REST)
    inside = tail < d
    x += batch * x_batch + token * x_token
    scale += batch * scale_batch + token * scale_token
    shift += batch * shift_batch + token * shift_token
    a, b = tl.load(x + head), tl.load(x + tail, mask=inside, other=0.0)
    mean = (tl.sum(a) + tl.sum(b)) / d
    a, b = a - mean, tl.where(inside, b - mean, 0.0)
    inverse = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / d + eps)
    a = a * inverse * tl.load(scale + head) + tl.load(shift + head)
    b = b * inverse * tl.load(scale + tail, mask=inside, other=0.0) + tl.load(shift + tail, mask=inside, other=0.0)
    _store_rows(a, b, out + row * d, scales + row, head, tail, inside)


@triton.jit
def _gelu(x):
    """x * sigmoid(2 z), which is x / 2 * (1 + tanh z), with z = sqrt(2 / pi) * (x + 0.044715 x^3); the constants hold
    -2 log2(e)."""
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))


@triton.jit
def _store_rows(a, b, out, scale_out, head, tail, inside):
    scale, inverse = power_of_two(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)))
    tl.store(out + head, (a * inverse).to(out.dtype.element_ty))
    tl.store(out + tail, (b * inverse).to(out.dtype.element_ty), mask=inside)
    tl.store(scale_out, scale)


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
    x, mean, inverse, out, n, x_batch, x_token, x_head,
    STEPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    columns = tl.arange(0, D)
    reciprocal = tl.load(inverse + batch * heads + head)
    if SMOOTH:
        middle = tl.load(mean + (batch * heads + head) * D + columns)[None, :]
    for step in range(STEPS):
        token = ((chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = x + batch * x_batch + token * x_token + head * x_head + columns[None, :]
        values = tl.load(at, mask=token < n, other=0.0).to(tl.float32)
        if SMOOTH:
            values -= middle
        at = out + ((batch * n + token) * heads + head) * D + columns[None, :]
        tl.store(at, (values * reciprocal).to(out.dtype.element_ty), mask=token < n)


@triton.jit
def _add_mean_kernel(x, mean, n, x_batch, x_token, x_head, STEPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, D)
    middle = tl.load(mean + (batch * tl.num_programs(1) + head) * D + columns)[None, :]
    for step in range(STEPS):
        token = ((chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = x + batch * x_batch + token * x_token + head * x_head + columns[None, :]
        values = tl.load(at, mask=token < n, other=0.0).to(tl.float32) + middle
        tl.store(at, values.to(x.dtype.element_ty), mask=token < n)


def to_rows(x: torch.Tensor, gelu: bool = False, dtype: torch.dtype = _FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.to_rows` and `fp8.gelu_rows`: numbers [..., d] in `dtype`, scales [..., 1]."""
    x, d = x.contiguous(), x.shape[-1]
    out, scales = _room(x, dtype)
    if x.numel():
        _rows_kernel[(x.numel() // d,)](x, out, scales, d, GELU=gelu, **_launch(d, 512 if gelu else 1024))
    return out, scales


def norm_rows(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, dtype: torch.dtype = _FP8
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.norm_rows`: numbers [B, n, d] in `dtype`, scales [B, n, 1]."""
    batch, n, d = x.shape
    scale, shift = scale.expand(x.shape), shift.expand(x.shape)
    out, scales = _room(x, dtype)
    if x.numel():
        strides = *x.stride()[:2], *scale.stride()[:2], *shift.stride()[:2]
        _norm_rows_kernel[(batch * n,)](x, scale, shift, out, scales, n, d, eps, *strides, **_launch(d))
    return out, scales


def sum_heads(x: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of x [B, n, H, D] of any dtype, float32 [B, H, D]; D a power of 2."""
    return _extents(x)[1].sum(1)


def add_mean_(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Add mean [B, H, D], float32 and contiguous, to every token of x [B, n, H, D] in place; D a power of 2."""
    batch, n, heads, d = x.shape
    grid = triton.cdiv(n, _ROWS * _STEPS), heads, batch
    _add_mean_kernel[grid](x, mean, n, *x.stride()[:3], _STEPS, _ROWS, d, num_warps=4)
    return x


def _extents(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greatest magnitudes and sums over each _CHUNK tokens of x [B, n, H, D], float32 [B, chunks, H, D]."""
    batch, n, heads, d = x.shape
    chunks = triton.cdiv(n, _CHUNK)
    largest, sums = torch.empty(2, batch, chunks, heads, d, device=x.device).unbind(0)
    _extent_kernel[(chunks, heads, batch)](x, largest, sums, n, *x.stride()[:3], _CHUNK, _ROWS, d, num_warps=8)
    return largest, sums


def _room(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return out, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _launch(d: int, per_warp: int = 1024) -> dict[str, int]:
    """Measured on an H200: norms and rounding are fastest with 4 warps for 5120 numbers, GELU with 16 for 13824."""
    full = triton.next_power_of_2(d + 1) // 2
    warps = min(16, max(1, full // per_warp))
    return {"FULL": full, "REST": triton.next_power_of_2(max(16, d - full)), "num_warps": warps}


def to_heads(
    x: torch.Tensor, smooth: bool, dtype: torch.dtype = _FP8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `fp8_attention.to_heads` and `to_smoothed_heads`: numbers in `dtype`, scales, mean.

    x may have any strides but in its last dimension, and D must be a power of 2.
    """
    batch, n, heads, d = x.shape
    strides, (largest, sums) = x.stride()[:3], _extents(x)
    chunks = sums.shape[1]
    mean = torch.empty(batch, heads, d, device=x.device)
    scale, inverse = torch.empty(2, batch, heads, device=x.device).unbind(0)
    _finish_kernel[(heads, batch)](largest, sums, mean, scale, inverse, n, chunks, smooth, 16, d)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    runs = triton.cdiv(n, _ROWS * _STEPS)
    _heads_kernel[(runs, heads, batch)](x, mean, inverse, out, n, *strides, _STEPS, _ROWS, d, smooth, num_warps=4)
    return out, scale, mean if smooth else None
