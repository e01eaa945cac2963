"""The functions of pointwise.py as Triton kernels: one program for each token, one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from .pointwise import ByToken, Vectors
from .triton_launch import KernelLauncher


@triton.jit
def _norm_kernel(
    x, scale, shift, out, rows, n, d, eps,
    x_batch, x_token, scale_batch, scale_token, shift_batch, shift_token,
    BLOCK: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    of_norm = tl.load(rows + token) if BY_TOKEN else token
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    values = tl.load(x + batch * x_batch + token * x_token + columns, mask=inside, other=0.0)
    centred = tl.where(inside, values - tl.sum(values) / d, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / d + eps)
    result = normed * tl.load(scale + batch * scale_batch + of_norm * scale_token + columns, mask=inside, other=0.0)
    result += tl.load(shift + batch * shift_batch + of_norm * shift_token + columns, mask=inside, other=0.0)
    tl.store(out + row * d + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_kernel(
    x, y, gate, scale, shift, out, rows, n, d, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_token, scale_batch, scale_token, shift_batch, shift_token,
    BLOCK: tl.constexpr, GATED: tl.constexpr, GATE_BY_TOKEN: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    of_gate = tl.load(rows + token) if GATE_BY_TOKEN else token
    of_norm = tl.load(rows + token) if BY_TOKEN else token
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    change = tl.load(y + batch * y_batch + token * y_token + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        change *= tl.load(gate + batch * gate_batch + of_gate * gate_token + columns, mask=inside, other=0.0)
    at = x + batch * x_batch + token * x_token + columns
    values = tl.load(at, mask=inside, other=0.0) + change
    tl.store(at, values, mask=inside)
    centred = tl.where(inside, values - tl.sum(values) / d, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / d + eps)
    result = normed * tl.load(scale + batch * scale_batch + of_norm * scale_token + columns, mask=inside, other=0.0)
    result += tl.load(shift + batch * shift_batch + of_norm * shift_token + columns, mask=inside, other=0.0)
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
def _add_kernel(
    x, y, gate, rows, n, d, x_batch, x_token, gate_batch, gate_token,
    BLOCK: tl.constexpr, GATED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    of_gate = tl.load(rows + token) if BY_TOKEN else token
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    at = x + batch * x_batch + token * x_token + columns
    change = tl.load(y + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        change *= tl.load(gate + batch * gate_batch + of_gate * gate_token + columns, mask=inside, other=0.0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + change, mask=inside)


_norm = KernelLauncher(_norm_kernel)
_add_norm = KernelLauncher(_add_norm_kernel)
_rms_norm = KernelLauncher(_rms_norm_kernel)
_add = KernelLauncher(_add_kernel)


def norm(x: torch.Tensor, scale: Vectors, shift: Vectors, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """See `pointwise.norm`."""
    batch, n, d = x.shape
    tensors, rows = (x, _vectors(scale, x), _vectors(shift, x)), _rows(scale)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        block, warps = _launch(d)
        constants = block, rows is not None
        _norm((batch * n,), (*tensors, out, _or(rows, x)), (n, d, eps, *_strides(tensors)), constants, warps)
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
    table = weight if rope is None else torch.view_as_real(rope)
    squares = weight if mean_square is None else mean_square.contiguous()
    half = 1 if rope is None else rope.shape[-1]
    if x.numel():
        block, warps = _launch(d)
        tensors = x, weight, table, squares, out
        constants = half, block // 2, rope is not None, mean_square is not None
        _rms_norm((batch * n,), tensors, (n, d, eps), constants, warps)
    return out


def add_(x: torch.Tensor, y: torch.Tensor, gate: Vectors | None) -> torch.Tensor:
    """See `pointwise.add_`."""
    batch, n, d = x.shape
    rows, gates = _rows(gate), x if gate is None else _vectors(gate, x)
    if x.numel():
        block, warps = _launch(d)
        tensors, constants = (x, y.contiguous(), gates, _or(rows, x)), (block, gate is not None, rows is not None)
        _add((batch * n,), tensors, (n, d, *_strides((x, gates))), constants, warps)
    return x


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Vectors | None,
    scale: Vectors,
    shift: Vectors,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `pointwise.add_norm`."""
    batch, n, d = x.shape
    y, of_gate, of_norm = y if y.stride(-1) == 1 else y.contiguous(), _rows(gate), _rows(scale)
    tensors = x, y, *(_vectors(v, x) for v in (x if gate is None else gate, scale, shift))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        block, warps = _launch(d)
        rows = _or(of_gate if of_norm is None else of_norm, x)
        constants = block, gate is not None, of_gate is not None, of_norm is not None
        _add_norm((batch * n,), (*tensors, out, rows), (n, d, eps, *_strides(tensors)), constants, warps)
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


def _vectors(v: Vectors, x: torch.Tensor) -> torch.Tensor:
    """The different vectors [B, R, d] of a `ByToken`, else vectors [B, n, d] with strides of 0 where they repeat."""
    return v.values.expand(len(x), -1, -1) if isinstance(v, ByToken) else v.expand(x.shape)


def _rows(v: Vectors | None) -> torch.Tensor | None:
    """Which of the R different vectors each token has, int64 [n]; None where v is written out."""
    return v.row.contiguous() if isinstance(v, ByToken) else None


def _or(rows: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """`rows`; where this is None, any tensor, as the kernel then does not read the argument."""
    return x if rows is None else rows


def _strides(tensors: Iterable[torch.Tensor]) -> list[int]:
    """The strides of the batch items and of the tokens, tensor after tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@functools.cache
def _launch(d: int) -> tuple[int, int]:
    """The number of columns of a program, and the number of its warps, for rows of d numbers."""
    block = triton.next_power_of_2(d)
    return block, min(16, max(1, block // 512))
