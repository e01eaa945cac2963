"""The blocks of gguf_blocks.py dequantised by Triton in one pass: packed bytes are read once, numbers written once.

To bf16 that moves 2.6 bytes a number of Q4_K and 3.1 of Q8_0; torch's 25 and 5 kernels move 34 and 21.

A program takes some blocks. A lane reads eight bytes that follow each other, as wide as the blocks' alignment allows,
and writes the runs of eight numbers that are packed in them, 16 bytes each, so that it computes a scale once a run; the
scales of a block are small loads that the lanes of the block share. Sums and products are those of gguf_blocks.py in
the same order, none of them fused, so that the results are the same to the bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..ops.triton_launch import KernelLauncher
from .formats.gguf_blocks import BLOCKS, GgufWeight

_WARPS = 4
_NUMBERS = 4096
"""How many numbers a program writes, four runs of eight a lane; with half as many Q4_K takes a tenth longer (H200)."""


@triton.jit
def _half(at):
    """The float16 number at an even address, as float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _float(digits, shift: tl.constexpr = 0, less: tl.constexpr = 0):
    """(digits >> shift) - less as float32, where the bits that a shift loses are zero.

    The digits, fewer than 23, become the last ones of a power of two, which is taken away again: both steps are exact,
    save the shift, and GPUs convert bytes at a quarter of the rate of sums.
    """
    one: tl.constexpr = 0x4B000000 - (shift << 23)  # 2^23 / 2^shift
    return (digits | one).to(tl.float32, bitcast=True) - (8388608.0 / (1 << shift) + less)


@triton.jit
def _store(values, to, first, column, columns, RAGGED: tl.constexpr):
    """Store numbers that are `column` numbers into their blocks, the first of which is column `first` of its row."""
    values = values.to(to.dtype.element_ty)
    if RAGGED:
        place = first + column
        tl.store(to + column, values, mask=(place >= 0) & (place < columns))
    else:
        tl.store(to + column, values)


# Every kind loads all that it needs before it stores anything, as no load is moved across a store.


@triton.jit
def _k_scales(at, i):
    """Scale and offset of the i-th 32 numbers of a Q4_K or Q5_K block."""
    scale, offset, rest = _byte(at + 4 + i % 4), _byte(at + 8 + i % 4), _byte(at + 12 + i % 4)
    later = i >= 4
    scale = tl.where(later, (rest & 15) | ((scale >> 2) & 48), scale & 63)
    offset = tl.where(later, (rest >> 4) | ((offset >> 2) & 48), offset & 63)
    return _half(at) * _float(scale), _half(at + 2) * _float(offset)


@triton.jit
def _four_or_five_k(at, to, first, columns, FIVE: tl.constexpr, RAGGED: tl.constexpr):
    at, to, first = at[:, None, None], to[:, None, None], first[:, None, None]
    group, i = tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
    packed = _byte(at + (48 if FIVE else 16) + group * 32 + i)
    low, high = packed & 0x0F, packed & 0xF0
    if FIVE:
        fifth = _byte(at + 16 + group * 0 + i) >> (2 * group)
        low, high = low | ((fifth << 4) & 0x10), high | ((fifth << 7) & 0x100)
    scale, offset = _k_scales(at, 2 * group)
    scale_of_high, offset_of_high = _k_scales(at, 2 * group + 1)
    column = group * 64 + i
    _store(scale * _float(low) - offset, to, first, column, columns, RAGGED)
    _store(scale_of_high * _float(high, 4) - offset_of_high, to, first, column + 32, columns, RAGGED)


@triton.jit
def _sixteenths():
    """Places in 64 bytes: halves of a block, halves of 32 bytes, 16 bytes."""
    half, part = tl.arange(0, 2)[None, :, None, None], tl.arange(0, 2)[None, None, :, None]
    return half, part, tl.arange(0, 16)[None, None, None, :]


@triton.jit
def _two_bits(packed, scales, factor, factor_of_offset, RUN: tl.constexpr):
    scale, offset = factor * _float(scales & 0x0F), factor_of_offset * _float(scales & 0xF0, 4)
    return scale * _float(packed & (3 << (2 * RUN)), 2 * RUN) - offset


@triton.jit
def _two_k(at, to, first, columns, RAGGED: tl.constexpr):
    at, to, first = at[:, None, None, None], to[:, None, None, None], first[:, None, None, None]
    half, part, i = _sixteenths()
    within, of_half = part * 16 + i, at + half * 8 + part
    packed = _byte(at + 16 + half * 32 + within)
    factor, factor_of_offset = _half(at + 80), _half(at + 82)
    a = _two_bits(packed, _byte(of_half), factor, factor_of_offset, 0)
    b = _two_bits(packed, _byte(of_half + 2), factor, factor_of_offset, 1)
    c = _two_bits(packed, _byte(of_half + 4), factor, factor_of_offset, 2)
    d = _two_bits(packed, _byte(of_half + 6), factor, factor_of_offset, 3)
    _store_runs(a, b, c, d, to, first, half * 128 + within, columns, RAGGED)


@triton.jit
def _three_bits(packed, third, at, half, part, factor, RUN: tl.constexpr):
    low = _byte(at + 96 + (2 * RUN) % 8 + half * 0 + part) >> (half * 4)
    high = _byte(at + 104 + (2 * RUN) % 4 + half * 0 + part) >> (half * 4 + RUN // 2 * 2)
    digits = (packed & (3 << (2 * RUN))) | ((third << (RUN + 2)) & (4 << (2 * RUN)))
    return factor * _float((low & 15) | ((high & 3) << 4), 0, 32) * _float(digits, 2 * RUN, 4)


@triton.jit
def _three_k(at, to, first, columns, RAGGED: tl.constexpr):
    at, to, first = at[:, None, None, None], to[:, None, None, None], first[:, None, None, None]
    half, part, i = _sixteenths()
    within = part * 16 + i
    packed = _byte(at + 32 + half * 32 + within)
    third = _byte(at + half * 0 + within) >> (half * 4)
    factor = _half(at + 108)
    a = _three_bits(packed, third, at, half, part, factor, 0)
    b = _three_bits(packed, third, at, half, part, factor, 1)
    c = _three_bits(packed, third, at, half, part, factor, 2)
    d = _three_bits(packed, third, at, half, part, factor, 3)
    _store_runs(a, b, c, d, to, first, half * 128 + within, columns, RAGGED)


@triton.jit
def _six_bits(packed, high, scale, factor, HIGH: tl.constexpr):
    """Numbers of the low or the high halves of bytes; `high` has their last two bits four places further on."""
    shift: tl.constexpr = 4 if HIGH else 0
    digits = (packed & (0x0F << shift)) | (high & (0x30 << shift))
    return factor * _float(scale ^ 128, 0, 128) * _float(digits, shift, 32)


@triton.jit
def _six_k(at, to, first, columns, RAGGED: tl.constexpr):
    at, to, first = at[:, None, None, None], to[:, None, None, None], first[:, None, None, None]
    half, part, i = _sixteenths()
    within, scales = part * 16 + i, at + 192 + half * 8 + part
    high = _byte(at + 128 + half * 32 + within)
    packed, later = _byte(at + half * 64 + within), _byte(at + half * 64 + 32 + within)
    factor = _half(at + 208)
    a = _six_bits(packed, high << 4, _byte(scales), factor, False)
    b = _six_bits(later, high << 2, _byte(scales + 2), factor, False)
    c = _six_bits(packed, high << 4, _byte(scales + 4), factor, True)
    d = _six_bits(later, high << 2, _byte(scales + 6), factor, True)
    _store_runs(a, b, c, d, to, first, half * 128 + within, columns, RAGGED)


@triton.jit
def _store_runs(a, b, c, d, to, first, column, columns, RAGGED: tl.constexpr):
    _store(a, to, first, column, columns, RAGGED)
    _store(b, to, first, column + 32, columns, RAGGED)
    _store(c, to, first, column + 64, columns, RAGGED)
    _store(d, to, first, column + 96, columns, RAGGED)


@triton.jit
def _eight(at, to, first, columns, RAGGED: tl.constexpr):
    at, to, first = at[:, None], to[:, None], first[:, None]
    i = tl.arange(0, 32)[None, :]
    _store(_float(_byte(at + 2 + i) ^ 128, 0, 128) * _half(at), to, first, i, columns, RAGGED)


@triton.jit
def _four_or_five(at, to, first, columns, FIVE: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr):
    at, to, first = at[:, None, None], to[:, None, None], first[:, None, None]
    byte, bit = tl.arange(0, 2)[None, :, None], tl.arange(0, 8)[None, None, :]
    bits: tl.constexpr = 4 if OFFSET else 2
    less: tl.constexpr = 0 if OFFSET else 16 if FIVE else 8
    column = byte * 8 + bit
    packed, scale = _byte(at + bits + (4 if FIVE else 0) + column), _half(at)
    low, high = packed & 0x0F, packed & 0xF0
    if FIVE:
        low |= ((_byte(at + bits + byte) >> bit) & 1) << 4
        high |= ((_byte(at + bits + 2 + byte) >> bit) & 1) << 8
    low, high = scale * _float(low, 0, less), scale * _float(high, 4, less)
    if OFFSET:
        offset = _half(at + 2)
        low, high = low + offset, high + offset
    _store(low, to, first, column, columns, RAGGED)
    _store(high, to, first, column + 16, columns, RAGGED)


@triton.jit(do_not_specialize=["total", "of_row", "stride", "columns", "skip"])
def _dequantize_kernel(
    blocks, out, total, of_row, stride, columns, skip,
    KIND: tl.constexpr, NUMBERS: tl.constexpr, NBYTES: tl.constexpr, COUNT: tl.constexpr,
    ALIGNED: tl.constexpr, RAGGED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Dequantise `total` blocks, `of_row` of which form a row.

    RAGGED says that rows of blocks are apart in memory, or that the matrix begins or ends within blocks; otherwise the
    kernel ignores rows. Every block's address is a multiple of ALIGNED bytes. `columns` and `skip` count units of UNIT
    numbers, so that the compiler knows how wide a store can be.
    """
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    block = tl.minimum(block, total - 1)  # lanes past the end write the last block again
    if RAGGED:
        columns, row, place = columns * UNIT, block // of_row, block % of_row
        first = place * NUMBERS - skip * UNIT
        at = blocks + (row.to(tl.int64) * stride + place * NBYTES)
        to = out + (row.to(tl.int64) * columns + first)
    else:
        first = block
        at, to = blocks + block.to(tl.int64) * NBYTES, out + block.to(tl.int64) * NUMBERS
    at = tl.multiple_of(at, ALIGNED)
    if KIND == "Q4_K":
        _four_or_five_k(at, to, first, columns, False, RAGGED)
    elif KIND == "Q5_K":
        _four_or_five_k(at, to, first, columns, True, RAGGED)
    elif KIND == "Q6_K":
        _six_k(at, to, first, columns, RAGGED)
    elif KIND == "Q2_K":
        _two_k(at, to, first, columns, RAGGED)
    elif KIND == "Q3_K":
        _three_k(at, to, first, columns, RAGGED)
    elif KIND == "Q8_0":
        _eight(at, to, first, columns, RAGGED)
    elif KIND == "Q4_0":
        _four_or_five(at, to, first, columns, False, False, RAGGED)
    elif KIND == "Q4_1":
        _four_or_five(at, to, first, columns, False, True, RAGGED)
    elif KIND == "Q5_0":
        _four_or_five(at, to, first, columns, True, False, RAGGED)
    else:
        tl.static_assert(KIND == "Q5_1")
        _four_or_five(at, to, first, columns, True, True, RAGGED)


_dequantize = KernelLauncher(_dequantize_kernel, enable_fp_fusion=False)


def dequantize(
    weight: GgufWeight, dtype: torch.dtype, written: int | None = None, warps: int | None = None
) -> torch.Tensor:
    """See `GgufWeight.dequantize`.

    Args:
        written, warps: numbers that a program writes, and how many warps it has; powers of 2, None chooses.
    """
    kind, blocks, block = weight.dtype, weight.blocks, BLOCKS[weight.dtype]
    if blocks.stride(1) != 1 or (blocks.data_ptr() | blocks.stride(0)) % 2:
        blocks = blocks.clone(memory_format=torch.contiguous_format)  # scales are read as float16 numbers
    out = torch.empty(weight.shape, dtype=dtype, device=blocks.device)
    if not out.numel():
        return out
    of_row, stride = blocks.shape[1] // block.nbytes, blocks.stride(0)
    total, count = len(blocks) * of_row, (written or _NUMBERS) // block.numbers
    ragged = not blocks.is_contiguous() or weight.columns != of_row * block.numbers
    unit = 8 if math.gcd(weight.columns, weight.skip, 8) == 8 else 1
    aligned = math.gcd(blocks.data_ptr(), stride if ragged else 0, block.nbytes, 8)
    numbers = total, of_row, stride, weight.columns // unit, weight.skip // unit
    constants = kind, block.numbers, block.nbytes, count, aligned, ragged, unit
    _dequantize((triton.cdiv(total, count),), (blocks, out), numbers, constants, warps or _WARPS)
    return out
