"""The functions of pointwise.py as Triton kernels: one program for each token, one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from .triton_launch import Launcher


@triton.jit
def _norm_kernel(
    x, scale, shift, out, n, d, eps,
    x_batch, x_token, scale_batch, scale_token, shift_batch, shift_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    values = tl.load(x + batch * x_batch + token * x_token + columns, mask=inside, other=0.0)
    centred = tl.where(inside, values - tl.sum(values) / d, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / d + eps)
    result = normed * tl.load(scale + batch * scale_batch + token * scale_token + columns, mask=inside, other=0.0)
    result += tl.load(shift + batch * shift_batch + token * shift_token + columns, mask=inside, other=0.0)
    tl.store(out + row * d + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_kernel(
    x, y, gate, scale, shift, out, n, d, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_token, scale_batch, scale_token, shift_batch, shift_token,
    BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    change = tl.load(y + batch * y_batch + token * y_token + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        change *= tl.load(gate + batch * gate_batch + token * gate_token + columns, mask=inside, other=0.0)
    at = x + batch * x_batch + token * x_token + columns
    values = tl.load(at, mask=inside, other=0.0) + change
    tl.store(at, values, mask=inside)
    centred = tl.where(inside, values - tl.sum(values) / d, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / d + eps)
    result = normed * tl.load(scale + batch * scale_batch + token * scale_token + columns, mask=inside, other=0.0)
    result += tl.load(shift + batch * shift_batch + token * shift_token + columns, mask=inside, other=0.0)
    tl.store(out + row * d + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_kernel(
    x, weight, rope, mean_square, out, n, d, eps,
    HALF_HEAD: tl.constexpr, PAIRS: tl.constexpr, ROTATE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, 2 * PAIRS)
    inside = columns < d
    values = tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(mean_square + row) if GIVEN else tl.sum(values * values) / d
    result = values * tl.rsqrt(square + eps)
    result *= tl.load(weight + columns, mask=inside, other=0.0)
    if ROTATE:
        pair = tl.arange(0, PAIRS)
        angle = rope + ((row % n) * HALF_HEAD + pair % HALF_HEAD) * 2
        cos, sin = tl.load(angle), tl.load(angle + 1)
        real, imaginary = tl.split(tl.reshape(result, (PAIRS, 2)))
        rotated = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
        result = tl.reshape(rotated, (2 * PAIRS,))
    tl.store(out + row * d + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_kernel(x, y, gate, n, d, x_batch, x_token, gate_batch, gate_token, BLOCK: tl.constexpr, GATED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    at = x + batch * x_batch + token * x_token + columns
    change = tl.load(y + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        change *= tl.load(gate + batch * gate_batch + token * gate_token + columns, mask=inside, other=0.0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + change, mask=inside)


_norm = Launcher(_norm_kernel)
_add_norm = Launcher(_add_norm_kernel)
_rms_norm = Launcher(_rms_norm_kernel)
_add = Launcher(_add_kernel)


def norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """See `pointwise.norm`."""
    batch, n, d = x.shape
    tensors = x, _rows(scale, x), _rows(shift, x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        block, warps = _launch(d)
        _norm((batch * n,), (*tensors, out), (n, d, eps, *_strides(tensors)), (block,), warps)
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rope: torch.Tensor | None,
    mean_square: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `pointwise.rms_norm`."""
    batch, n, d = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    rotate, given = rope is not None, mean_square is not None
    table = torch.view_as_real(rope) if rotate else weight
    squares = mean_square.contiguous() if given else weight
    half = rope.shape[-1] if rotate else 1
    if x.numel():
        block, warps = _launch(d)
        tensors, constants = (x, weight, table, squares, out), (half, block // 2, rotate, given)
        _rms_norm((batch * n,), tensors, (n, d, eps), constants, warps)
    return out


def add_(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """See `pointwise.add_`."""
    batch, n, d = x.shape
    gated = gate is not None
    gate = _rows(gate, x) if gated else x
    if x.numel():
        block, warps = _launch(d)
        _add((batch * n,), (x, y.contiguous(), gate), (n, d, *_strides((x, gate))), (block, gated), warps)
    return x


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `pointwise.add_norm`."""
    batch, n, d = x.shape
    y, gated = y if y.stride(-1) == 1 else y.contiguous(), gate is not None
    tensors = x, y, *(_rows(v, x) for v in (gate if gated else x, scale, shift))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        block, warps = _launch(d)
        _add_norm((batch * n,), (*tensors, out), (n, d, eps, *_strides(tensors)), (block, gated), warps)
    return out


def try_out(device: torch.device) -> None:
    """Compile and run each kernel once on a few numbers; raises whatever Triton raises."""
    x = torch.ones(1, 2, 16, device=device)
    row = torch.ones(1, 1, 16, device=device)
    rope = torch.ones(2, 4, dtype=torch.complex64, device=device)
    y = norm(x, row, row, 1e-6, torch.bfloat16)
    rms_norm(y, row.view(-1), 1e-6, rope)
    rms_norm(y, row.view(-1), 1e-6, rope, x[..., 0])
    add_(x, x.clone(), row)
    add_norm(x, y, row, row, row, 1e-6, torch.bfloat16)
    add_norm(x, y, None, row, row, 1e-6, torch.bfloat16)
    torch.cuda.synchronize(device)


def _rows(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A modulation vector as [B, n, d] with strides of 0 where it repeats."""
    return v.expand(x.shape)


def _strides(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Of items and tokens, of all of them in turn."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@functools.cache
def _launch(d: int) -> tuple[int, int]:
    """Columns of a program, and its warps."""
    block = triton.next_power_of_2(d)
    return block, min(16, max(1, block // 512))
