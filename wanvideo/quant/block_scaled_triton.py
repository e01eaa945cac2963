"""NVFP4 and MXFP8 dequantised by Triton in one pass: packed bytes are read once, numbers written once.

Sums and products are the same as in block_scaled.py up to powers of two, and none is fused, so that the results are
equal to the bit. All conversions are by hand, as GPUs before Ada have no fp8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.triton_launch import KernelLauncher
from .formats.block_scaled import GROUPS, BlockScaledWeight

_NUMBERS = 2048
"""How many numbers a program writes."""


@triton.jit
def _with_sign(size, negative):
    """Give `size` its sign bit. A zero keeps its sign too, which a subtraction would lose."""
    return (size.to(tl.int32, bitcast=True) | (negative << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(byte):
    """The e4m3 number that a byte encodes, in float32."""
    digits = byte & 127
    normal = ((digits << 20) + (120 << 23)).to(tl.float32, bitcast=True)  # with the exponent of a float32
    size = tl.where(digits < 8, digits.to(tl.float32) * 0.001953125, normal)  # below, steps of 2**-9
    size = tl.where(digits == 127, float("nan"), size)
    return _with_sign(size, byte >> 7)


@triton.jit
def _e2m1(code):
    """The E2M1 number that four bits encode, in float32."""
    exponent, digit = (code >> 1) & 3, code & 1
    halves = tl.where(exponent == 0, digit, ((2 + digit) << exponent) >> 1)
    return _with_sign(halves.to(tl.float32) * 0.5, code >> 3)


@triton.jit(do_not_specialize=["total", "of_row", "stride", "stride_of_scales", "columns", "skip"])
def _dequantize_kernel(
    data, scales, scale, out, total, of_row, stride, stride_of_scales, columns, skip,
    PACKED: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """`total` groups of GROUP numbers, `of_row` of them a row. RAGGED: the matrix begins or ends within groups."""
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside, row, place = group < total, group // of_row, group % of_row
    byte = tl.load(scales + row * stride_of_scales + place, mask=inside, other=0).to(tl.int32)
    nbytes: tl.constexpr = GROUP // 2 if PACKED else GROUP
    i = tl.arange(0, nbytes)[None, :]
    at = data + (row * stride + place * nbytes)[:, None] + i
    packed = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
    if PACKED:
        factor = (_e4m3(byte) * tl.load(scale))[:, None]
        numbers = tl.interleave(_e2m1(packed >> 4) * factor, _e2m1(packed & 15) * factor)
    else:
        numbers = _e4m3(packed) * (byte << 23).to(tl.float32, bitcast=True)[:, None]
    column = (place * GROUP - skip)[:, None] + tl.arange(0, GROUP)[None, :]
    wanted = inside[:, None]
    if RAGGED:
        wanted = wanted & (column >= 0) & (column < columns)
    tl.store(out + row[:, None] * columns + column, numbers.to(out.dtype.element_ty), mask=wanted)


_dequantize = KernelLauncher(_dequantize_kernel, enable_fp_fusion=False)


def dequantize(weight: BlockScaledWeight, dtype: torch.dtype) -> torch.Tensor:
    """See `BlockScaledWeight.dequantize`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    data, scales = (x if x.stride(1) == 1 else x.contiguous() for x in (weight.data, weight.scales))
    group, (rows, of_row) = GROUPS[weight.kind].numbers, scales.shape
    count = _NUMBERS // group
    numbers = rows * of_row, of_row, data.stride(0), scales.stride(0), weight.columns, weight.skip
    constants = weight.kind == "NVFP4", group, count, weight.columns != of_row * group
    _dequantize((triton.cdiv(rows * of_row, count),), (data, scales, weight.scale, out), numbers, constants)
    return out
