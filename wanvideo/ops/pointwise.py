"""Operations between the matrix products: norms with modulation, rotated queries, gated sums.

Each function reads its input and writes its output once where Triton can be used (see `use_triton`), and is
plain torch elsewhere. Both compute in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn import functional as F

from .rope import apply_rope
from .triton_probe import tried_out

_kernels: ModuleType | None = None

_ROWS_OF_GELU = 32768
"""The most rows for which cuBLAS computes GELU in the product. With 5120 columns and this many rows, the product with
GELU takes 6.72 ms, against 7.14 ms with GELU in a kernel of its own; 75,600 rows take 16.63 ms with GELU in the product
and 16.34 ms with GELU in its own kernel (H200, torch 2.11)."""


@dataclass(frozen=True, eq=False)
class ByToken:
    """A vector for each token, stored as the few different vectors: with a vector stored for each token, these vectors
    would take more memory than all other activations.

    Args:
        values: float32 [B, R, d], the R different vectors.
        row: int64 [n], which of the R vectors each token has.
    """

    values: torch.Tensor
    row: torch.Tensor

    def of(self, tokens: slice) -> ByToken:
        """The vectors of some of the tokens."""
        return ByToken(self.values, self.row[tokens])


Vectors = torch.Tensor | ByToken
"""float32 [B, 1 or n, d]."""


def written_out(v: Vectors) -> torch.Tensor:
    """Vectors as a tensor, float32 [B, 1 or n, d]."""
    return v.values[:, v.row] if isinstance(v, ByToken) else v


def use_triton(device: torch.device) -> bool:
    """Use Triton's kernels on this device from now on if the kernels work (see `tried_out`); whether they do."""
    global _kernels
    if device.type != "cuda":
        return False
    if _kernels is None:
        _kernels = tried_out(".pointwise_triton", __package__, device)
    return _kernels is not None


def triton_in_use() -> bool:
    """Whether `use_triton` has found Triton to work in this process."""
    return _kernels is not None


def norm(x: torch.Tensor, scale: Vectors, shift: Vectors, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm(x) * scale + shift.

    Args:
        x: float32 [B, n, d].
        scale, shift: float32, [d], or [B, 1 or n, d]; both `ByToken`, with the same rows, or neither.
        dtype: of the result.
    """
    if x.is_cuda and _kernels is not None:
        return _kernels.norm(x, scale, shift, eps, dtype)
    scale, shift = written_out(scale), written_out(shift)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale).to(dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rope: torch.Tensor | None = None,
    mean_square: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dimension, then rotated by `rope`; in the dtype of x.

    Args:
        x: [B, n, d].
        weight: float32 [d].
        rope: complex64 [n, head_dim / 2], the same for all d / head_dim heads; None leaves it out.
        mean_square: float32 [B, n], the mean of the squares over a row of which x is a part; None where x is
            the whole row.
    """
    if x.is_cuda and _kernels is not None:
        return _kernels.rms_norm(x, weight, eps, rope, mean_square)
    if mean_square is None:
        y = F.rms_norm(x.float(), weight.shape, weight, eps)
    else:
        y = x.float() * torch.rsqrt(mean_square + eps).unsqueeze(-1) * weight
    if rope is not None:
        y = apply_rope(y.unflatten(-1, (-1, 2 * rope.shape[-1])), rope).flatten(-2)
    return y.to(x.dtype)


def add_(x: torch.Tensor, y: torch.Tensor, gate: Vectors | None = None) -> torch.Tensor:
    """x += y * gate in place.

    Args:
        x: float32 [B, n, d].
        y: [B, n, d], any float dtype.
        gate: float32 [B, 1 or n, d]; None is 1.
    """
    if x.is_cuda and _kernels is not None:
        return _kernels.add_(x, y, gate)
    return x.add_(y) if gate is None else x.addcmul_(y.float(), written_out(gate))


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Vectors | None,
    scale: Vectors,
    shift: Vectors,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`add_`, then `norm` of the sum: the same numbers, and x is read once for both.

    Arguments that are `ByToken` must have the same rows.
    """
    if x.is_cuda and _kernels is not None:
        return _kernels.add_norm(x, y, gate, scale, shift, eps, dtype)
    add_(x, y, gate)
    return norm(x, scale, shift, eps, dtype)


def gelu_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x @ weight.T + bias) by tanh, in the dtype of x, which all three have.

    On CUDA the product applies GELU before rounding to 16 bit, so that the columns go through memory once.
    """
    if not (x.is_cuda and torch.version.cuda and x.numel() and x.dtype in (torch.float16, torch.bfloat16)):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    out = x.new_empty(*x.shape[:-1], len(weight))
    pieces = (tensor.flatten(0, -2).split(_ROWS_OF_GELU) for tensor in (x, out))
    for rows, result in zip(*pieces, strict=True):
        torch._addmm_activation(bias, rows, weight.t(), use_gelu=True, out=result)
    return out
