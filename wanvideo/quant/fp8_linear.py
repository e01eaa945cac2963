"""Matrix products in eight bits: rows rounded to float8 e4m3, each with a scale of its own, times fp8 weights.

The scale of a row is a power of two. Such a scale loses nothing, as e4m3 rounds relative to each number. It also makes
the rounding of a number independent of the other numbers in its row, except for numbers 2**14 times smaller than the
largest, so that a tensor-parallel rank rounds its columns as one GPU does.

On CUDA, torch's scaled product multiplies, and Triton's kernels round where Triton is in use. On other devices a
reference rounds the same way and multiplies in float32. Sums are in float32 everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch.nn import functional as F

from ..base.user_error import UserError
from ..ops import pointwise
from ..ops.pointwise import Vectors, written_out
from .formats.fp8 import Fp8Weight

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
CAPABILITY = (8, 9)
"""The compute capability of Ada, the first architecture that multiplies in fp8."""

_ABOVE_1_75 = 0x1FFFFF
"""Added to the bits of a float32, carries into the exponent above a mantissa of 1.75: e4m3 ends at 1.75 * 2**8."""
_LEAST_EXPONENT = 27
"""The least biased exponent of a scale: a row of zeros has the scale 2**-100, whose reciprocal float32 still holds."""


class Fp8Error(UserError, ValueError):
    """fp8 cannot be used on this device, or with this file. The text says why and what to do."""


@dataclass(frozen=True, eq=False)
class Fp8Rows:
    """Rows ready for a product: data * scale, `data` e4m3 [..., d], `scale` float32 [..., 1].

    `dtype` is that of the product's result.
    """

    data: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """The rows in `dtype`, multiplied out in float32."""
        return (self.data.float() * self.scale).to(self.dtype)


def power_of_two(largest: torch.Tensor) -> torch.Tensor:
    """The smallest powers of two by which numbers of up to `largest` (float32) can be divided to fit into e4m3."""
    exponent = (((largest.contiguous().view(torch.int32) + _ABOVE_1_75) >> 23) - 8).clamp_min_(_LEAST_EXPONENT)
    return (exponent << 23).view(torch.float32)


def to_rows(x: torch.Tensor) -> Fp8Rows:
    """Round x [..., d] to nearest, with a scale for each row."""
    if kernels := fused(x.device):
        data, scale = kernels.to_rows(x)
        return Fp8Rows(data, scale, x.dtype)
    return _rounded(x.float(), x.dtype)


def gelu_rows(x: torch.Tensor) -> Fp8Rows:
    """GELU (tanh) of x [..., d] in float32, rounded once."""
    if kernels := fused(x.device):
        data, scale = kernels.to_rows(x, gelu=True)
        return Fp8Rows(data, scale, x.dtype)
    return _rounded(F.gelu(x.float(), approximate="tanh"), x.dtype)


def norm_rows(x: torch.Tensor, scale: Vectors, shift: Vectors, eps: float, dtype: torch.dtype) -> Fp8Rows:
    """`pointwise.norm` in float32, rounded once to fp8 rows; products of these rows come in `dtype`."""
    if kernels := fused(x.device):
        data, scales = kernels.norm_rows(x, written_out(scale), written_out(shift), eps)
        return Fp8Rows(data, scales, dtype)
    return _rounded(pointwise.norm(x, scale, shift, eps, torch.float32), dtype)


class GeluRows(torch.nn.Module):
    """The activation between the two products of a feed-forward: GELU, rounded to fp8 rows."""

    def forward(self, x: torch.Tensor) -> Fp8Rows:
        """`gelu_rows` of x [..., d]."""
        return gelu_rows(x)


def product(rows: Fp8Rows, weight: Fp8Weight, bias: torch.Tensor) -> torch.Tensor:
    """rows @ weight.T + bias in the dtype of `rows`.

    Args:
        rows: [..., columns].
        weight: float8_e4m3fn [rows, columns], each a multiple of 16 on CUDA.
        bias: [rows], any float dtype.

    Raises:
        Fp8Error: see `check_device`.
    """
    data, scale = rows.data.flatten(0, -2), rows.scale.flatten(0, -2)
    shape = (*rows.data.shape[:-1], weight.shape[0])
    if data.numel() == 0:  # a rank without tokens
        return torch.empty(shape, dtype=rows.dtype, device=data.device)
    multiply = _multiplication(data.device, rows.dtype)
    return multiply(data, scale, weight.data.contiguous(), _by_column(weight), bias).to(rows.dtype).view(shape)


def check_device(device: torch.device, dtype: torch.dtype) -> str:
    """Words for a user about how fp8 products with results in `dtype` run on this device.

    Raises:
        Fp8Error: the device has no fp8 products, or wrong ones.
    """
    return _NAMES[_multiplication(device, dtype)]


def fused(device: torch.device) -> ModuleType | None:
    """Triton's kernels, where this device can use them; Triton converts to e4m3 from compute capability 8.9 on."""
    usable = device.type == "cuda" and pointwise.triton_in_use() and torch.cuda.get_device_capability(device) >= (8, 9)
    return import_module(".fp8_linear_triton", __package__) if usable else None


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> Fp8Rows:
    """Round float32 `values` [..., d], with a power of two for each row: the division is exact."""
    scale = power_of_two(values.abs().amax(-1, keepdim=True))
    return Fp8Rows((values / scale).to(FP8), scale, dtype)


def _by_column(weight: Fp8Weight) -> torch.Tensor:
    """The scales of the output channels, float32 [1, rows]."""
    if weight.scale is None:
        return torch.ones(1, weight.shape[0], device=weight.device)
    return weight.scale.t() if len(weight.scale) > 1 else weight.scale.expand(1, weight.shape[0]).contiguous()


# Each takes e4m3 [n, d] with float32 [n, 1] and e4m3 [m, d] with float32 [1, m], and a bias [m] in any float dtype.

Multiplication = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _reference(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return (rows.float() @ weight.float().t()).mul_(row_scale).mul_(scale).add_(bias)


def _rowwise(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Product, scales and bias in one call, with a result in bf16."""
    return _scaled(rows, row_scale, weight, scale, bias, torch.bfloat16)


def _rowwise_fp16(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """As `_rowwise`, with a result in fp16, which older versions of torch refuse."""
    return _scaled(rows, row_scale, weight, scale, bias, torch.float16)


def _scaled(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """torch's scaled product with fast accumulation, which is 7 to 25 % faster and has an error of 0.2 to 0.3 % with
    5,120 to 13,824 columns (H200, 2026-11-21), a tenth of the error of rounding to e4m3."""
    return torch._scaled_mm(
        rows, weight.t(), row_scale, scale, bias=bias.to(dtype), out_dtype=dtype, use_fast_accum=True
    )


def _tensorwise(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """A product for GPUs that multiply with a single scale: the scales of rows and columns follow in own passes."""
    one = torch.ones((), device=rows.device)
    out = torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
    return out.mul_(row_scale).mul_(scale).add_(bias)


_NAMES: dict[Multiplication, str] = {
    _reference: "computed in float32",
    _rowwise: "scaled by rows",
    _rowwise_fp16: "scaled by rows",
    _tensorwise: "scaled behind the product",
}
_TOLERANCE = 1e-2
"""Greatest relative error of a product against float64 on the same rounded numbers. The limit allows for the rounding
of the result to bf16 and of the sums in the tensor cores."""


@functools.cache
def _multiplication(device: torch.device, dtype: torch.dtype) -> Multiplication:
    """The fastest product with right results in `dtype` on this device; every product is tried out once."""
    if device.type != "cuda":
        return _reference
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < CAPABILITY:
        raise Fp8Error(
            f"fp8_mode needs a GPU that multiplies in fp8 (compute capability 8.9: Ada, Hopper or newer), and {name} "
            f"has {capability[0]}.{capability[1]}. Set fp8_mode to disabled; base_precision fp8_e4m3fn saves memory."
        )
    reasons = []
    for multiply in (*([_rowwise_fp16] if dtype == torch.float16 else []), _rowwise, _tensorwise):
        try:
            error = _error_of(multiply, device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as problem:  # not built for this GPU
            reasons.append(str(problem).strip().splitlines()[0])
            continue
        if error <= _TOLERANCE:  # NaN must not pass
            return multiply
        reasons.append(f"off by {error:.1e}")
    raise Fp8Error(
        f"torch {torch.__version__} has no working fp8 product for {name} ({'; '.join(reasons)}). "
        "Set fp8_mode to disabled, or update torch."
    )


def _error_of(multiply: Multiplication, device: torch.device) -> float:
    """The relative error of `multiply` on small matrices, against float64."""
    generator = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(rows, 256, device=device, generator=generator) for rows in (48, 64))
    bias = torch.randn(64, device=device, generator=generator)
    rows, weight = _rounded(x * torch.logspace(-2, 2, 48, device=device)[:, None], torch.float32), _rounded(w, FP8)
    expected = (rows.data.double() * rows.scale) @ (weight.data.double() * weight.scale).t() + bias
    got = multiply(rows.data, rows.scale, weight.data, weight.scale.t(), bias).double()
    error = float((got - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf
