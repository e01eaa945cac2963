"""Tensor parallelism on one page: each rank has some heads and some hidden columns (Megatron-LM, arXiv 1909.08053).

The matrices of q, k and v and the first matrix of a feed-forward are cut by rows, the matrix of o and the second matrix
by columns. So a rank computes, from its heads or hidden columns and without any exchange, a partial sum over the full
width, and one all-reduce completes the sum. The attentions that only some Wan models have (to speech, to a face, to
sound, to music) are cut in the same way. The norms of q and k go over the full width, of which a rank has a part, so
the ranks add up their sums of squares, one number a token. The residual stream is the same on all ranks of a group.

The sums travel in the compute dtype. In float32 the result is exact but for rounding. In 16 bit each rank rounds its
part of a sum before the residual stream adds up the parts in float32: on a random model the error against float32 is
1.09, 1.16 and 1.32 times the error of one process on 2, 4 and 8 ranks (bf16, gloo). Sums in float32 would not add to
the error, but take twice the bytes, and these sums, three of the full width in each block, are by far the largest
exchange of all strategies. The sums of cross-attention and feed-forward can travel while another slice of tokens is
computed (`overlapped`). They have a communicator of their own, as the norms' small reduces would queue behind them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from ...wanvideo.base.lora import LoraDelta, narrow_delta
from ...wanvideo.base.variant import COLUMNS, GATHERED, ONCE, PAIRS, ROWS, Splits, Variant, attention_splits, registered
from ...wanvideo.model.layers import Attention, Block
from ...wanvideo.model.model import WanModel
from ...wanvideo.quant.quantized import Weight, rows_together
from ..comm import timing
from ..plan.degrees import bounds

_UNIT = 64  # hidden columns of uneven parts: GPUs multiply matrices of odd sizes several times slower
_SPLITS: Splits = (
    *attention_splits("(self|cross)_attn"),
    (r"(ffn|text_embedding)\.0\.(weight|bias)", ROWS),
    (r"(ffn|text_embedding)\.2\.weight", COLUMNS),
    (r"(ffn|text_embedding)\.2\.bias", ONCE),
    (r"time_projection\.1\.(weight|bias)", GATHERED),
)
"""How the tensors that every model has are divided; a variant says how its own tensors are."""

_USED_LATER = re.compile(r"(^|\.)(cross_attn\.o|ffn\.2)$")  # outputs that a block asks to have `arrived`


def split_of(name: str) -> str | None:
    """How the tensor of that name is divided; None if every rank has the whole."""
    return next((how for pattern, how in _patterns(registered()) if pattern.search(name)), None)


@functools.cache
def _patterns(variants: tuple[type[Variant], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    splits = (*_SPLITS, *(split for variant in variants for split in variant.splits))
    return tuple((re.compile(rf"(^|\.){pattern}$"), how) for pattern, how in splits)


@dataclass(frozen=True)
class TensorShard:
    """What one of `size` tensor-parallel ranks holds and sums. A size of 1 is the whole model.

    Attention is cut between heads because the number of heads is a multiple of `size` (`ParallelPlan.check_model`).
    """

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    overlapped: dist.ProcessGroup | None = None
    _travelling: dict[int, dist.Work] = field(default_factory=dict, compare=False)

    def held_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this rank's part of a tensor."""
        dim, runs = self._cut(name, shape)
        return (*shape[:dim], sum(length for _, length in runs), *shape[dim + 1 :])

    def take(self, name: str, weight: Weight) -> Weight:
        """This rank's part of a tensor. Where the tensor is mapped from a file, no other part is read."""
        if split_of(name) == ONCE and self.index > 0 and isinstance(weight, torch.Tensor):  # no bias is quantised
            return torch.zeros_like(weight)
        dim, runs = self._cut(name, tuple(weight.shape))
        if runs == [(0, weight.shape[dim])]:
            return weight
        return rows_together([weight.narrow(dim, *run) for run in runs])

    def take_deltas(self, name: str, shape: tuple[int, ...], deltas: Sequence[LoraDelta]) -> Sequence[LoraDelta]:
        """The part of `deltas` of a whole tensor, which has `shape`, that changes this rank's part of the tensor.

        Raises:
            LoraError: a delta does not have the shape of the whole.
        """
        if split_of(name) == ONCE and self.index > 0:
            return ()
        dim, runs = self._cut(name, shape)
        if runs == [(0, shape[dim])]:
            return deltas
        return [narrow_delta(delta, shape, dim, runs) for delta in deltas]

    def apply(self, model: WanModel) -> None:
        """Let a model that holds this rank's parts compute the same outputs as the whole model."""
        if self.size == 1:
            return
        for name, module in model.named_modules():
            if isinstance(module, Attention):
                module.mean_squares = self.mean_squares
            if isinstance(module, Block):
                module.over_heads = self.sum
                if self.overlapped is not None:
                    module.at_once, module.arrived = 2, self._arrived
            how = split_of(f"{name}.weight")
            if how == COLUMNS:
                later = self.overlapped is not None and _USED_LATER.search(name) is not None
                module.register_forward_hook(self._start_sum if later else self._sum_output)
            elif how == GATHERED:
                module.register_forward_hook(self._gather_output)

    def mean_squares(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        """Mean squares [B, n] over the full width of rows [B, n, width / size]; all travel in one reduce."""
        sums = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() for x in rows]
        means = self.sum(torch.cat([s.flatten() for s in sums])) / (rows[0].shape[-1] * self.size)
        return [mean.view_as(s) for mean, s in zip(means.split([s.numel() for s in sums]), sums, strict=True)]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Add up x over the ranks, in place."""
        if x.numel():
            with timing.measure_wait(timing.SUMS, self.group):
                dist.all_reduce(x, group=self.group)
        return x

    def _cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
        """This rank's part: the dimension, and start and length of each run in it."""
        how = split_of(name) if self.size > 1 else None
        if how is None or how == ONCE:
            return 0, [(0, shape[0])]
        dim, halves = 1 if how == COLUMNS else 0, 2 if how == PAIRS else 1
        size = shape[dim] // halves
        unit = _UNIT if size % self.size and size % _UNIT == 0 else 1
        start, stop = bounds(size // unit, self.size, self.index)
        return dim, [(half * size + start * unit, (stop - start) * unit) for half in range(halves)]

    def _sum_output(self, _module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return self.sum(output)

    def _start_sum(self, _module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if output.numel():
            self._travelling[id(output)] = dist.all_reduce(output, group=self.overlapped, async_op=True)

    def _arrived(self, output: torch.Tensor) -> torch.Tensor:
        """Make the device wait for the sum of an `output` whose sum `_start_sum` began."""
        work = self._travelling.pop(id(output), None)
        if work is not None:
            with timing.measure_wait(timing.SUMS, self.overlapped):
                work.wait()
        return output

    def _gather_output(self, _module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(output) for _ in range(self.size)]
        with timing.measure_wait(timing.SUMS, self.group):
            dist.all_gather(parts, output, group=self.group)
        return torch.cat(parts, dim=-1)
