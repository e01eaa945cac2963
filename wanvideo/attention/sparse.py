"""Sparse self-attention by comfy-kitchen's kernel (Sol-Attn, arXiv 2607.24027), tried out before it is used. Lossy.

Blocks of 64 queries attend to chosen blocks of 64 keys exactly, and to all other blocks through one pooled term each. A
head is computed by itself: the result for some heads has the same bits whatever other heads are computed beside them.
So ranks that share heads (Ulysses, tensor parallelism) get what one GPU would. The kernel gives no log-sum-exp, which a
ring would need.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.attention_choice import BLOCK, SparseSettings
from . import kitchen
from .kernels import SIXTEEN_BIT, AttentionError, AttentionKernel

HEAD_DIM = 128
"""The only head dimension that the kernel on GPUs has. All released Wan models have it."""
_OLDEST_GPU = (8, 0)
_ALIGNMENT = 16
"""The kernel loads so many bytes at once, from addresses that divide by this number."""
_WAY_OUT = "Remove the sparse attention node."
_BOUND = 0.1
"""Greatest relative error against the plain reference on normal numbers: the kernel rounds queries and keys to int8."""

Function = Callable[..., Tensor]
"""comfy-kitchen's `sol_attn`."""


@dataclass(frozen=True)
class ExactTokens:
    """The tokens of a sequence that are not the video's: every query attends to them exactly, and they to all keys.

    Args:
        front, tail: how many lie before the tokens of the video, and behind them.
    """

    front: int = 0
    tail: int = 0

    def blocks(self, tokens: int) -> list[int]:
        """First block with such tokens and the block behind the last, of a sequence whose front tokens have been moved
        to its end where there are tokens at both ends."""
        if self.tail:
            return [(tokens - self.tail - self.front) // BLOCK, -(-tokens // BLOCK)]
        return [0, -(-self.front // BLOCK)]


class SparseAttention:
    """The self-attention of one forward: sparse, with dense attention in some of the transformer blocks.

    Args:
        function: of `load`.
        dense: the kernel of the dense blocks.
        exact: tokens that are not the video's.

    Attributes:
        block: the transformer block that is being computed; whoever runs the blocks sets it.
    """

    def __init__(self, function: Function, dense: AttentionKernel, settings: SparseSettings, exact: ExactTokens):
        self._function, self._dense, self._settings, self._exact = function, dense, settings, exact
        self.block = 0

    @property
    def kernel(self) -> AttentionKernel:
        """This attention as a kernel, which has no log-sum-exp."""
        return AttentionKernel(f"sol_attn+{self._dense.name}", self._forward, has_lse=False, lossy=True)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, _want_lse: bool) -> tuple[Tensor, None]:
        if self.block in self._settings.dense_blocks:
            return self._dense(q, k, v), None
        return self._sparse(q, k, v), None

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, moved = q.shape[1], self._exact.front if self._exact.tail else 0
        if moved:  # the kernel takes one run of exact blocks, and no query minds the order of the keys
            q, k, v = (x.roll(-moved, dims=1) for x in (q, k, v))
        exact = self._exact.blocks(tokens)
        settings = self._settings
        out = self._function(
            *(_aligned(x) for x in (q, k, v)),
            tau=settings.tau,
            topk_ratio=settings.keep,
            token_aug=settings.extra_tokens,
            sink_blocks=exact,
            sink_q=exact,
        )
        return out.roll(moved, dims=1) if moved else out


def load(device: torch.device, dtype: torch.dtype, head_dim: int) -> Function:
    """comfy-kitchen's sparse attention, tried out once on this device and dtype; its plain reference on a CPU.

    Raises:
        AttentionError: the package is missing or too old, or has no kernel for this device, dtype or head dimension, or
            a wrong one.
    """
    device = torch.device(device)
    reason = kitchen.refusal("Sparse attention") or _refusal(device, dtype, head_dim)
    if reason is not None:
        raise AttentionError(reason)
    try:
        package = importlib.import_module("comfy_kitchen")
        function = package.sol_attn
        if device.type == "cpu":
            return _head_by_head(function)
        if not package.sol_attn_is_available(device):
            raise AttentionError(
                f"The installed comfy-kitchen {kitchen.version()} has no sparse attention for "
                f"{torch.cuda.get_device_name(device)}. {kitchen.INSTALL}, in a build for CUDA."
            )
        reference = importlib.import_module("comfy_kitchen.backends.eager.sol_attn").sol_attn
    except (ImportError, AttributeError, OSError) as error:
        raise AttentionError(
            f"comfy-kitchen {kitchen.version()} is installed but its sparse attention can't be loaded ({error}). "
            f"{kitchen.INSTALL}"
        ) from error
    _try_out(function, reference, device, dtype)
    return function


def _refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot run here, as two sentences; None if it can."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _OLDEST_GPU:
        return (
            f"Sparse attention needs a GPU of sm_80 or newer, and {torch.cuda.get_device_name(device)} is "
            f"sm_{major}{minor}. {_WAY_OUT}"
        )
    if dtype not in SIXTEEN_BIT:
        return (
            f"Sparse attention computes in 16 bit, and the activations are {str(dtype).removeprefix('torch.')}. "
            "Switch use_bf16 or use_fp16 on in XDit+USP Config, or remove the sparse attention node."
        )
    if head_dim != HEAD_DIM:
        return f"Sparse attention needs heads of {HEAD_DIM} numbers, and this model's have {head_dim}. {_WAY_OUT}"
    return None


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where the kernel could not load from its addresses."""
    strides = (x.stride(axis) * x.itemsize for axis in range(3) if x.shape[axis] > 1)
    fits = x.stride(-1) == 1 and not x.data_ptr() % _ALIGNMENT and not any(step % _ALIGNMENT for step in strides)
    return x if fits or not x.is_cuda else x.contiguous()


def _head_by_head(function: Function) -> Function:
    """The plain reference, one head at a time: its scores are as many numbers as the square of the tokens."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        heads = (function(*(x[:, :, head : head + 1] for x in (q, k, v)), **options) for head in range(q.shape[2]))
        return torch.cat(list(heads), dim=2)

    return attend


_tried: set[tuple[torch.device, torch.dtype]] = set()


def _try_out(function: Function, reference: Function, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernel with its plain reference where both must choose the same blocks: all blocks, none beside their
    neighbours, the blocks of exact tokens, and a share of blocks whose scores lie far apart.

    Raises:
        AttentionError: it fails, or is wrong.
    """
    if (device, dtype) in _tried:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for what, inputs, options in _trials(device, dtype):
        try:
            error = relative_error(function(*inputs, **options), reference(*inputs, **options))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, TypeError, ValueError) as failed:
            raise AttentionError(f"Sparse attention fails on {name} ({failed}). {_WAY_OUT}") from failed
        if not error <= _BOUND:  # NaN must not pass
            raise AttentionError(
                f"Sparse attention is wrong on {name}: with {what} it is off by {error:.1e}. "
                f"Install another comfy-kitchen than {kitchen.version()}, or remove the sparse attention node."
            )
    _tried.add((device, dtype))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The distance of two tensors, relative to the norm of the second."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


Trial = tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]


def _trials(device: torch.device, dtype: torch.dtype) -> list[Trial]:
    tokens, blocks = 1000, 16  # the last block is not full
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    v = normal(1, tokens, 2, HEAD_DIM).to(dtype)
    plain = normal(1, tokens, 2, HEAD_DIM).to(dtype), normal(1, tokens, 2, HEAD_DIM).to(dtype), v
    # each block of keys points elsewhere, and each block of queries to three of these, with scores far apart
    directions = torch.linalg.qr(normal(HEAD_DIM, blocks)).Q.T
    wanted = sum(weight * directions.roll(turn, 0) for turn, weight in ((3, 1.0), (6, 0.8), (9, 0.6)))
    of_token = torch.arange(tokens, device=device) // BLOCK
    noise = (0.3 * normal(1, tokens, 2, HEAD_DIM) for _ in range(2))
    q, k = (
        (12 * x[of_token][None, :, None] + more).to(dtype) for x, more in zip((wanted, directions), noise, strict=True)
    )
    apart = q, k, v
    ends, all_blocks, never = [14, blocks], [0, blocks], 1e4
    return [
        ("all blocks", plain, {"tau": never, "sink_q": all_blocks}),
        ("neighbours alone", plain, {"tau": never}),
        ("exact tokens at the end", plain, {"tau": never, "sink_blocks": ends, "sink_q": ends}),
        ("a fixed share of blocks", apart, {"tau": never, "topk_ratio": 3 / blocks}),
    ]  # fmt: skip
