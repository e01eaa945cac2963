"""The layers of the Wan DiT, under the original key names: linear layers, norms, attention, blocks, the head.

Follows Wan 2.1/2.2 `wan/modules/model.py`. The residual stream, the norms, the modulation and the head are
float32; matrix products and attention run in the compute dtype. That costs memory bandwidth and makes a
16-bit forward several times closer to the float32 one than a 16-bit residual stream does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..attention.kernels import AttentionKernel
from ..base.config import WanConfig
from ..base.grid import PATCH
from ..ops import pointwise
from ..ops.pointwise import ByToken, Vectors
from ..quant import fp8_linear
from ..quant.formats.fp8 import Fp8Weight
from ..quant.fp8_linear import Fp8Rows
from ..quant.quantized import as_tensor
from .text_keys import Keys

TIMESTEP_PERIOD = 10000.0

SelfAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v), each [B, n, heads, head_dim], to the attention output of the same n tokens over all tokens."""

Announce = Callable[[str, torch.Tensor], None]
"""A function that receives "v", "k" and "q" of a `SelfAttention` call, each as soon as the tensor is computed. A
`SelfAttention` that has such a method `announce` can send each tensor while the next tensor is computed."""

MeanSquares = Callable[..., "list[torch.Tensor] | list[None]"]
"""A function from rows [B, n, d], of which this device may hold some columns, to the mean squares [B, n] of the whole
rows in float32. It gives None for rows that this device holds whole, whose mean squares the norm computes itself."""


Reduce = Callable[[torch.Tensor], torch.Tensor]
"""A function that combines a tensor over ranks in place, number by number: by the sum or by the maximum."""


@dataclass(frozen=True)
class OverSequence:
    """Sum and maximum over the ranks that share the tokens of a video; a single rank leaves its tensor as it is."""

    add: Reduce
    largest: Reduce


class Linear(nn.Module):
    """x @ weight.T + bias in the dtype of x, whatever the dtype of `weight`, which may be a `QuantizedWeight`.

    With `fp8`, x is rounded to fp8 and multiplied by fp8 weights as they are; see fp8_linear.py.
    """

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)
        self.ready: torch.Tensor | None = None  # the weight converted, while it is used several times
        self.fp8 = False

    def forward(self, x: torch.Tensor | Fp8Rows) -> torch.Tensor:
        """x [..., columns] to [..., rows], in the dtype of x (the compute dtype of fp8 rows)."""
        if self.fp8 and isinstance(self.weight, Fp8Weight):
            return fp8_linear.product(x if isinstance(x, Fp8Rows) else fp8_linear.to_rows(x), self.weight, self.bias)
        if isinstance(x, Fp8Rows):  # shared with fp8 weights, which this file has not everywhere
            x = x.dequantize()
        return F.linear(x, *self._in(x.dtype))

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU (by tanh) of the result of `forward`, in the same shape and dtype."""
        return pointwise.gelu_product(x, *self._in(x.dtype))

    def _in(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias in `dtype`."""
        return as_tensor(self.weight if self.ready is None else self.ready, dtype), self.bias.to(dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width (all heads together), then the rotation of `rope_table`.

    A caller whose x has only some of the heads gives `mean_square` [B, n] of the full width.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor | None = None, mean_square: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, n, dim], with `rope` [n, head_dim/2] rotated, in the dtype of x."""
        return pointwise.rms_norm(x, self.weight, self.eps, rope, mean_square)


class LayerNorm(nn.Module):
    """A LayerNorm with learned scale and shift, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor, dtype: torch.dtype, to_fp8: bool = False) -> torch.Tensor | Fp8Rows:
        """x [B, n, dim] in float32 to the same shape in `dtype`."""
        return _norm(x, self.weight, self.bias, self.eps, dtype, to_fp8)

    def after(
        self, x: torch.Tensor, change: torch.Tensor, gate: Vectors, dtype: torch.dtype, to_fp8: bool
    ) -> torch.Tensor | Fp8Rows:
        """Add change * gate to x in place, and return the norm of the sum; see `add_norm`."""
        return add_norm(x, change, gate, self.weight, self.bias, self.eps, dtype, to_fp8)


class PatchEmbedding(nn.Module):
    """The Conv3d of the original (kernel = stride = patch) as one product over the tokens of `patchify`."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *PATCH), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, n, in_dim*4], float32, to [B, n, dim]."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class Attention(nn.Module):
    """The projections and norms of self- and cross-attention; `image` adds the projections and the norm of CLIP tokens.

    The weights decide the number of heads: a tensor-parallel rank has the weights of some heads, and sets
    `mean_squares` for the norms over all heads.
    """

    def __init__(self, config: WanConfig, image: bool = False):
        super().__init__()
        self.head_dim = config.head_dim
        self.mean_squares: MeanSquares = _whole_rows
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.image = image
        if image:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def linears(self) -> list[Linear]:
        """The linear layers."""
        return [module for module in self.children() if isinstance(module, Linear)]

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] as [..., heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def self_attention(
        self, x: torch.Tensor | Fp8Rows, rope: torch.Tensor, attend: SelfAttention, announce: Announce
    ) -> torch.Tensor:
        """x [B, n, dim] in the compute dtype, rope [n, head_dim/2]."""
        v = self.by_head(self.v(x))
        announce("v", v)
        k = self.k(x)
        k = self.by_head(self.norm_k(k, rope, *self.mean_squares(k)))
        announce("k", k)
        q = self.q(x)
        q = self.by_head(self.norm_q(q, rope, *self.mean_squares(q)))
        announce("q", q)
        return self.o(attend(q, k, v).flatten(2))

    def context_keys(self, inputs: BlockInputs) -> Keys:
        """The keys and values of the text and, if the block attends to an image, those of the image."""
        sources = [(inputs.context, self.k, self.v, self.norm_k)]
        if self.image and inputs.image is not None:
            sources.append((inputs.image, self.k_img, self.v_img, self.norm_k_img))
        keys = [k(context) for context, k, _, _ in sources]
        squares = self.mean_squares(*keys)
        return [
            (self.by_head(norm(key, None, square)), self.by_head(v(context)))
            for key, square, (context, _, v, norm) in zip(keys, squares, sources, strict=True)
        ]

    def cross_attention(self, x: torch.Tensor | Fp8Rows, keys: Keys, kernel: AttentionKernel) -> torch.Tensor:
        """Attend from x [B, n, dim] to every text slot, padding included, as Wan was trained, and add the attention to
        the image, which has a softmax of its own."""
        q = self.q(x)
        q = self.by_head(self.norm_q(q, None, *self.mean_squares(q)))
        attended = kernel(q, *keys[0])
        for more in (key for key in keys[1:] if key[0].shape[1]):
            attended = attended + kernel(q, *more)
        return self.o(attended.flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers and an activation between them; where this is GELU, the first layer computes it itself."""

    @property
    def up(self) -> Linear:
        """The first product."""
        return cast(Linear, self[0])

    @property
    def down(self) -> Linear:
        """The second product."""
        return cast(Linear, self[2])

    def forward(self, x: torch.Tensor | Fp8Rows) -> torch.Tensor:
        """Apply the layers to x [B, n, dim]; the result has the same shape."""
        if isinstance(self[1], nn.GELU) and isinstance(x, torch.Tensor):
            return self.down(self.up.gelu(x))
        return super().forward(x)


def no_announcement(_kind: str, _x: torch.Tensor) -> None:
    """An `Announce` that ignores the tensors."""


def _whole_rows(*rows: torch.Tensor) -> list[None]:
    return [None] * len(rows)


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward.

    Attributes:
        at_once: slices of tokens whose computation takes turns. With 2, data that one slice waits for can arrive while
            the other slice is computed.
        arrived: called with the output of cross-attention or feed-forward before its use; returns the complete output.
        over_heads: adds up a tensor over the ranks that have heads of the same tokens.
        fp8: whether the products are in fp8; set by `use_fp8`.
    """

    def __init__(self, config: WanConfig, image: bool = False):
        super().__init__()
        self.at_once = 1
        self.arrived: Reduce = _as_it_is
        self.over_heads: Reduce = _as_it_is
        self.fp8 = False
        self.dim, self.eps = config.dim, config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim), requires_grad=False)
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config, image)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )

    def use_fp8(self) -> None:
        """Multiply in fp8 where weights are in fp8; norms and activation then supply the products with fp8 rows."""
        self.fp8 = True
        self.ffn[1] = fp8_linear.GeluRows()
        for linear in (*self.self_attn.linears(), *self.cross_attn.linears(), self.ffn.up, self.ffn.down):
            linear.fp8 = True

    def forward(self, x: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """Change x [B, n, dim] (float32) in place and return it."""
        dtype = inputs.compute_dtype
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = inputs.modulation(self.modulation)
        y = _norm(x, scale, shift, self.eps, dtype, self.fp8)
        attended = self.self_attn.self_attention(y, inputs.rope, inputs.attend, inputs.announce)
        keys = inputs.keys_of(self.cross_attn)
        goes_on = type(self).between is Block.between  # nothing comes between cross-attention and feed-forward

        def work(s: slice) -> Iterator[None]:
            part = x[:, s]
            y = self.norm3.after(part, attended[:, s], rows(gate, s), dtype, self.fp8)
            y = self.cross_attn.cross_attention(y, keys, inputs.kernel)
            yield
            y, modulation = self.arrived(y), (rows(scale_ffn, s), rows(shift_ffn, s))
            if goes_on:
                y = add_norm(part, y, None, *modulation, self.eps, dtype, self.fp8)
            else:
                pointwise.add_(part, y)
                self.between(part, s, inputs)
                y = _norm(part, *modulation, self.eps, dtype, self.fp8)
            y = self.ffn(y)
            yield
            pointwise.add_(part, self.arrived(y), rows(gate_ffn, s))

        take_turns((work(s) for s in self._slices(x.shape[1], inputs)), self.at_once)
        return x

    def between(self, x: torch.Tensor, s: slice, inputs: BlockInputs) -> None:
        """Change x, the tokens `s` of this rank, in place between cross-attention and feed-forward."""

    def used_by_slices(self) -> list[nn.Module]:
        """The modules that every slice of tokens goes through."""
        return [self.cross_attn.q, self.cross_attn.o, *self.ffn]

    def _slices(self, length: int, inputs: BlockInputs) -> Iterator[slice]:
        """The slices of `length` tokens; the matrices that all slices use stay converted until the last is done."""
        runs = list(slices(length, inputs.slice_tokens, self.at_once))
        linears = [module for module in self.used_by_slices() if isinstance(module, Linear)]
        try:
            for linear in linears if len(runs) > 1 and not self.fp8 else ():
                linear.ready = as_tensor(linear.weight, inputs.compute_dtype)
            yield from runs
        finally:
            for linear in linears:
                linear.ready = None


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def take_turns(works: Iterator[Iterator[None]], at_once: int) -> None:
    """Run all generators of `works` to their ends; up to `at_once` of them take turns, from one `yield` to the next."""
    active = deque(islice(works, at_once))
    while active:
        work = active.popleft()
        try:
            next(work)
            active.append(work)
        except StopIteration:
            active.extendleft(islice(works, 1))  # begins before the other works go on, which wait for data


class Head(nn.Module):
    """The last layer: a norm, modulated by the time, and the linear layer from tokens to the velocity."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim), requires_grad=False)
        self.head = Linear(config.dim, config.out_dim * math.prod(PATCH))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """x [B, n, dim] and the time embedding [B, R, dim], float32, to [B, n, 4*out_dim]."""
        shift, scale = (embedding + m for m in self.modulation.unbind(1))
        vectors = inputs.by_token(1 + scale), inputs.by_token(shift)
        return self.head(pointwise.norm(x, *vectors, self.eps, x.dtype))


@dataclass(frozen=True)
class BlockInputs:
    """The arguments that every block of one forward gets beside the tokens."""

    time: torch.Tensor  # [B, R, 6, dim] float32 of `time_vectors`: one row for all tokens, or one a frame
    row_of_token: torch.Tensor | None  # [n] into R; None where R is 1
    context: torch.Tensor  # [B, L, dim], compute dtype
    image: torch.Tensor | None  # CLIP tokens in the same form, for blocks that attend to them
    rope: torch.Tensor  # [n, head_dim/2] complex64
    attend: SelfAttention
    announce: Announce
    kernel: AttentionKernel
    compute_dtype: torch.dtype
    slice_tokens: int
    audio_context: Any = None  # further context of a variant's blocks (see `WanModel.audio_context`)
    kept: dict[nn.Module, Keys] | None = None  # by cross-attention, where they are kept (see text_keys.py)

    def keys_of(self, attention: Attention) -> Keys:
        """The keys and values of the text and the image in `attention`; where `kept` is set, computed only once."""
        if self.kept is None:
            return attention.context_keys(self)
        if attention not in self.kept:
            self.kept[attention] = attention.context_keys(self)
        return self.kept[attention]

    def modulation(self, block: torch.Tensor) -> list[Vectors]:
        """The six vectors (shift, 1 + scale, gate) x 2 of a block, each [B, 1 or n, dim]."""
        return [self.by_token(v) for v in (self.time + block.unsqueeze(1)).unbind(2)]

    def by_token(self, v: torch.Tensor) -> Vectors:
        """Vectors for each token, out of the vectors v [B, R, dim] for each time."""
        return v if self.row_of_token is None else ByToken(v, self.row_of_token)


def _norm(
    x: torch.Tensor, scale: Vectors, shift: Vectors, eps: float, dtype: torch.dtype, to_fp8: bool
) -> torch.Tensor | Fp8Rows:
    """LayerNorm(x) * scale + shift in `dtype`, or as fp8 rows for products in `dtype`."""
    return (fp8_linear.norm_rows if to_fp8 else pointwise.norm)(x, scale, shift, eps, dtype)


def add_norm(
    x: torch.Tensor,
    change: torch.Tensor,
    gate: Vectors | None,
    scale: Vectors,
    shift: Vectors,
    eps: float,
    dtype: torch.dtype,
    to_fp8: bool,
) -> torch.Tensor | Fp8Rows:
    """Add change * gate to x in place, and return `_norm` of the sum."""
    if not to_fp8:
        return pointwise.add_norm(x, change, gate, scale, shift, eps, dtype)
    pointwise.add_(x, change, gate)
    return fp8_linear.norm_rows(x, scale, shift, eps, dtype)


def slices(length: int, step: int, parts: int = 1) -> Iterator[slice]:
    """Cut `length` tokens into at least `parts` runs of at most `step` tokens; a `step` of 0 sets no limit."""
    step = min(step or length, math.ceil(length / parts)) or 1  # a rank has no tokens where there are fewer than ranks
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def rows(v: Vectors, s: slice) -> Vectors:
    """The vectors of the tokens `s`, out of vectors v for each token, or the single vector that all tokens share."""
    if isinstance(v, ByToken):
        return v.of(s)
    return v if v.shape[1] == 1 else v[:, s]


def time_vectors(projection: torch.Tensor) -> torch.Tensor:
    """The vectors [B, R, 6, dim] that all blocks add to their modulation, from the projected time [B, R, 6*dim]. The
    two scales among the vectors contain the 1 of `1 + scale` already."""
    vectors = projection.unflatten(-1, (6, -1)).clone()
    vectors[:, :, 1::3] += 1
    return vectors


def sinusoid(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines, then sines, of timestep [...] at dim/2 frequencies; float32 [..., dim]."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double().unsqueeze(-1) * TIMESTEP_PERIOD**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
