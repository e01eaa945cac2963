"""NVFP4 and MXFP8 dequantised by Triton in one pass: packed bytes are read once, numbers written once.

Sums and products are those of block_scaled.py up to powers of two, none of them fused, so that the results are the same
to the bit. All conversions are by hand: GPUs before Ada have no fp8.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .block_scaled import GROUPS, BlockScaledWeight
from .triton_launch import Launcher

_NUMBERS = 2048
"""That a program writes."""


@triton.jit
def _with_sign(size, negative):
    """Zero has one too, which a subtraction would lose."""
    return (size.to(tl.int32, bitcast=True) | (negative << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(byte):
    """A byte as the e4m3 number that it is, in float32."""
    digits = byte & 127
    normal = ((digits << 20) + (120 << 23)).to(tl.float32, bitcast=True)  # with the exponent of a float32
    size = tl.where(digits < 8, digits.to(tl.float32) * 0.001953125, normal)  # below, steps of 2**-9
    size = tl.where(digits == 127, float("nan"), size)
    return _with_sign(size, byte >> 7)


@triton.jit
def _e2m1(code):
    """Four bits as the E2M1 number that they are, in float32."""
    exponent, digit = (code >> 1) & 3, code & 1
    halves = tl.where(exponent == 0, digit, ((2 + digit) << exponent) >> 1)
    return _with_sign(halves.to(tl.float32) * 0.5, code >> 3)


@triton.jit(do_not_specialize=["total", "of_row", "stride", "stride_of_scales", "columns", "skip"])
def _dequantize_kernel(
    data, scales, scale, out, total, of_row, stride, stride_of_scales, columns, skip,
    PACKED: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
    ALIGNED: tl.constexpr, RAGGED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`total` groups of GROUP numbers, `of_row` of them a row. The constants are those of gguf_triton.py."""
    group = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    group = tl.minimum(group, total - 1)  # those past the end write the last one again
    nbytes: tl.constexpr = GROUP // 2 if PACKED else GROUP
    if RAGGED:
        columns, row, place = columns * UNIT, (group // of_row).to(tl.int64), group % of_row
        first = place * GROUP - skip * UNIT
        at, at_scale = data + (row * stride + place * nbytes), scales + (row * stride_of_scales + place)
        to = out + (row * columns + first)
    else:
        first = group
        at, at_scale, to = data + group.to(tl.int64) * nbytes, scales + group, out + group.to(tl.int64) * GROUP
    byte = tl.load(at_scale).to(tl.int32)
    packed = tl.load(tl.multiple_of(at, ALIGNED)[:, None] + tl.arange(0, nbytes)[None, :]).to(tl.int32)
    if PACKED:
        factor = (_e4m3(byte) * tl.load(scale))[:, None]
        numbers = tl.interleave(_e2m1(packed >> 4) * factor, _e2m1(packed & 15) * factor)
    else:
        numbers = _e4m3(packed) * (byte << 23).to(tl.float32, bitcast=True)[:, None]
    column = tl.arange(0, GROUP)[None, :]
    if RAGGED:
        wanted = (first[:, None] + column >= 0) & (first[:, None] + column < columns)
        tl.store(to[:, None] + column, numbers.to(out.dtype.element_ty), mask=wanted)
    else:
        tl.store(to[:, None] + column, numbers.to(out.dtype.element_ty))


_dequantize = Launcher(_dequantize_kernel, enable_fp_fusion=False)


def dequantize(weight: BlockScaledWeight, dtype: torch.dtype) -> torch.Tensor:
    """See `BlockScaledWeight.dequantize`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    data, scales = (x if x.stride(1) == 1 else x.contiguous() for x in (weight.data, weight.scales))
    group, (rows, of_row) = GROUPS[weight.kind], scales.shape
    ragged = not (data.is_contiguous() and scales.is_contiguous()) or weight.columns != of_row * group
    unit = 8 if math.gcd(weight.columns, weight.skip, 8) == 8 else 1
    total, count, stride = rows * of_row, _NUMBERS // group, data.stride(0)
    aligned = math.gcd(data.data_ptr(), stride if ragged else 0, data.shape[1] // of_row, 8)
    numbers = total, of_row, stride, scales.stride(0), weight.columns // unit, weight.skip // unit
    constants = weight.kind == "NVFP4", group, count, aligned, ragged, unit
    _dequantize((triton.cdiv(total, count),), (data, scales, weight.scale, out), numbers, constants)
    return out
