"""The functions of vae_ops.py as Triton kernels.

Convolution: the buffer with its border is one matrix of positions x channels. A tap of the kernel reads the same matrix
some rows further on, so a convolution is a sum of products of shifted matrices. The columns of a tap that follow each
other in memory are taken as one longer row. Positions on the border, a row and a column in some hundred, are computed
too, but not stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """Positions and channels that one program computes, inputs that it reads at a time, and how it is launched.

    Output channels come in two parts, as 96, 160 and 192 are sums of two powers of two.
    """

    positions: int
    channels: int
    more_channels: int
    inputs: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["last", "frame", "row", "rows", "columns"])
def _conv_kernel(
    x, weight, bias, residual, out,
    last, frame, row, rows, columns, frame_stride, row_stride,
    C: tl.constexpr, OUT: tl.constexpr, PADDED: tl.constexpr, KH: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """frame, row: positions of a padded frame and row; rows, columns: of the output; last: its last position."""
    blocks: tl.constexpr = PADDED // (BN + BN2)
    pid = tl.program_id(0)
    first_channel = (pid % blocks) * (BN + BN2)
    first = (pid // blocks).to(tl.int64) * BM
    inner = tl.arange(0, BK)
    behind = tl.minimum(tl.arange(0, BM), (last - first).to(tl.int32))  # those past the end read the last one again
    a_at = x + first * C + behind[:, None] * C + inner[None, :]
    b_at = weight + inner[:, None] * PADDED + first_channel + tl.arange(0, BN)[None, :]
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    if BN2 > 0:
        b2_at = weight + inner[:, None] * PADDED + first_channel + BN + tl.arange(0, BN2)[None, :]
        sums2 = tl.zeros((BM, BN2), dtype=tl.float32)
    for i in range(TAPS * STEPS):
        tap = i // STEPS
        shift = (tap // KH) * frame_stride + (tap % KH) * row_stride + (i % STEPS) * BK
        a = tl.load(a_at + shift)
        sums = tl.dot(a, tl.load(b_at + i * BK * PADDED), sums)
        if BN2 > 0:
            sums2 = tl.dot(a, tl.load(b2_at + i * BK * PADDED), sums2)
    position = first + tl.arange(0, BM)
    t, rest = position // frame, position % frame
    y, column = rest // row, rest % row
    inside = (position <= last) & (y < rows) & (column < columns)
    to = ((t * rows + y) * columns + column) * OUT
    _store(out, residual, bias, sums, to, inside, first_channel + tl.arange(0, BN), OUT, RESIDUAL)
    if BN2 > 0:
        _store(out, residual, bias, sums2, to, inside, first_channel + BN + tl.arange(0, BN2), OUT, RESIDUAL)


@triton.jit
def _store(out, residual, bias, sums, to, inside, channel, OUT: tl.constexpr, RESIDUAL: tl.constexpr):
    mask = inside[:, None] & (channel < OUT)[None, :]
    at = to[:, None] + channel[None, :]
    sums += tl.load(bias + channel, mask=channel < OUT, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "rows", "columns"])
def _norm_silu_kernel(
    x, gamma, out, pixels, rows, columns, frame_stride, row_stride, eps,
    C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    channel = tl.arange(0, BC)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    values = tl.load(x + pixel[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / C + eps)
    values = values * scale[:, None] * tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    values = values * tl.sigmoid(values)
    column, rest = pixel % columns, pixel // columns
    to = (rest // rows) * frame_stride + (rest % rows) * row_stride + column * C
    tl.store(out + to[:, None] + channel[None, :], values.to(out.dtype.element_ty), mask=mask)


def fits(weight: torch.Tensor) -> bool:
    """Whether the convolution kernel takes this weight [O, C, ...]: whole vectors of inputs."""
    return weight.shape[1] % 16 == 0


def default_tile(inputs: int, channels: int) -> Tile:
    """For `inputs` numbers that follow each other in memory (input channels x columns of the kernel)."""
    step = next(size for size in (64, 32, 16) if inputs % size == 0)
    if channels % 192 == 0 and channels % 128:
        return Tile(128, 128, 64, min(step, 32), 8, 4)
    if channels % 160 == 0 and channels % 128:
        return Tile(128, 128, 32, min(step, 32), 8, 4)
    if channels % 96 == 0 and channels % 128:
        return Tile(128, 64, 32, min(step, 32), 4, 4)
    width = min(128, max(16, triton.next_power_of_2(channels)))
    return Tile(128, width, 0, min(step, 32), 8 if width == 128 else 4, 4)


class Conv:
    """A `vae_ops.Convolution` of weight [O, C, kt, kh, kw] and bias [O]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, tile: Tile | None = None):
        self.channels, self.inputs, *self.size = weight.shape
        kt, kh, kw = self.size
        self.tile = tile or default_tile(self.inputs * kw, self.channels)
        width = self.tile.channels + self.tile.more_channels
        self.padded = -(-self.channels // width) * width
        self.weight = weight.new_zeros(kt * kh * kw * self.inputs, self.padded)
        self.weight[:, : self.channels] = weight.permute(2, 3, 4, 1, 0).reshape(-1, self.channels)
        self.bias = bias.contiguous()

    def __call__(self, buffer: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (kt, kh, kw), tile, c = self.size, self.tile, self.inputs
        padded_frames, padded_rows, padded_columns, _ = buffer.shape
        frames, rows, columns = padded_frames - kt + 1, padded_rows - kh + 1, padded_columns - kw + 1
        out = buffer.new_empty(frames, rows, columns, self.channels)
        if residual is not None and not residual.is_contiguous():
            residual = residual.contiguous()
        last = ((frames - 1) * padded_rows + rows - 1) * padded_columns + columns - 1
        programs = (last // tile.positions + 1) * (self.padded // (tile.channels + tile.more_channels))
        _conv_kernel[(programs,)](
            buffer, self.weight, self.bias, out if residual is None else residual, out,
            last, padded_rows * padded_columns, padded_columns, rows, columns,
            padded_rows * padded_columns * c, padded_columns * c,
            c, self.channels, self.padded, kh, kt * kh, kw * c // tile.inputs,
            tile.positions, tile.channels, tile.more_channels, tile.inputs, residual is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out


def norm_silu(x: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
    """See `vae_ops.VAEOps.norm_silu`; `out` has the strides of a buffer of its own number of channels."""
    x = x.contiguous()
    frames, rows, columns, channels = x.shape
    block = triton.next_power_of_2(channels)
    pixels = max(1, 4096 // block)
    _norm_silu_kernel[(triton.cdiv(frames * rows * columns, pixels),)](
        x, gamma, out, frames * rows * columns, rows, columns, out.stride(0), out.stride(1), 1e-30,
        channels, pixels, block, num_warps=4,
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """Compile and run each kernel once on a few numbers; raises whatever Triton raises."""
    buffer = torch.zeros(3, 4, 4, 32, device=device, dtype=torch.bfloat16)
    norm_silu(buffer[:1, :2, :2].contiguous(), buffer[0, 0, 0], buffer[2:, 1:-1, 1:-1])
    Conv(buffer.new_zeros(32, 32, 3, 3, 3), buffer.new_zeros(32))(buffer)
    torch.cuda.synchronize(device)
