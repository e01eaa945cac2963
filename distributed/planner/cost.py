"""How long a forward is expected to take under a plan: arithmetic, bytes over the links, waiting. Numbers only.

What counts is the ratio between plans, which have the same arithmetic: they differ in how evenly they share it out, in
what they send, and in the weights that are not there when their turn comes. The constants are of 4 H200s, where the
expectation is within 10 % of what was measured (see tests/distributed/planner/test_cost.py); the rates of a machine
are measured when its workers start (see probe.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ...wanvideo.base.variant import Hearing
from ..plan.degrees import ParallelPlan, SequenceDegrees, bounds
from ..protocol.machine import Machine

TEXT_TOKENS = 512
IMAGE_TOKENS = 257
"""Of a start image, where a model has no positions for more."""
_FRAME_TOKENS = 30 * 52
"""Of a latent frame at 480p: a forward's tokens do not tell its frames, on which little depends."""
_MEMORY_BYTES = 70
"""Through memory for each token, channel and block outside products and attention (benchmarks/LOG.md, 4)."""
_HEARD_BYTES = 20
"""Likewise, where tokens hear something: its norm, a copy of what is heard, and the sum."""
_HOP_SECONDS = 6e-3
"""From ComfyUI to the workers and back."""
_SUMS, _HIDDEN_SUMS = 3, 1
"""Of tensor-parallel ranks in a block, and what of them travels during computation: half of two (see tensor.py). That
behind an attention to something else is one more."""
_EXPOSED_HEADS = 0.3
"""What Ulysses' exchange costs though it runs beside the computation (see ulysses_overlap.py), as a share of its time:
14B at 480p on 2 H200s through host memory takes 1.364 s with it and 1.760 s without (benchmarks/LOG.md, 12)."""
_GATHER_COST = 0.5
"""What a gather of weights costs though it is hidden, as a share of its time: NCCL's kernels take multiprocessors from
the computation beside it (benchmarks/LOG.md, 5)."""


class Dimensions(Protocol):
    """The fields of `WanConfig` that count here."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_dim: int
    image_positions: int

    @property
    def carried(self) -> int:
        """Streams of tokens that go from one pipeline stage to the next beside the video's."""

    @property
    def hearing(self) -> Hearing:
        """What tokens attend to of their frame."""

    def in_turn(self, blocks: range) -> list[int]:
        """The numbers of these blocks and of the side blocks behind them."""


@dataclass(frozen=True)
class Work:
    """One forward.

    Args:
        tokens: of one item.
        items: branches of cfg times videos.
        itemsize: bytes of the compute dtype.
        max_batch: items that go through the model at once.
        overlap: see `PoolSettings`.
    """

    tokens: int
    items: int = 1
    itemsize: int = 2
    max_batch: int = 1
    overlap: bool = True


@dataclass(frozen=True)
class Blocks:
    """Where a rank's blocks lie: each has `nbytes`, of which it keeps 1/share; `hosted` blocks in host memory."""

    nbytes: int = 0
    share: int = 1
    hosted: int = 0


@dataclass(frozen=True)
class Expected:
    """Seconds of a forward, by what they go into; `idle` is that of stages without work."""

    compute: float
    exchange: float
    weights: float
    idle: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange + self.weights + self.idle + _HOP_SECONDS


def expect(
    config: Dimensions, plan: ParallelPlan, work: Work, machine: Machine, blocks: Blocks | None = None
) -> Expected:
    """The expected time of one forward on the busiest rank.

    Raises:
        PlanError: the heads cannot be shared out like this.
    """
    stages, groups = plan.pipeline_parallel, plan.data_parallel if work.items >= plan.data_parallel else 1
    degrees = plan.sequence_degrees(config.num_heads, plan.group_ranks(work.items))
    items = math.ceil(work.items / groups)
    slices = math.ceil(items / min(work.max_batch, math.ceil(items / stages)))
    spans = (range(*bounds(config.num_layers, stages, stage)) for stage in range(stages))
    layers = max(len(config.in_turn(span)) for span in spans)  # VACE with one context
    compute = layers * _block_compute(config, plan, degrees, work, machine)
    exchange = layers * _block_exchange(config, degrees, plan.tensor_parallel, work, machine)
    waits = layers * _exchanges(config, degrees, plan.tensor_parallel) * machine.latency  # for each slice
    passing = 0.0
    if stages > 1:
        stream = (1 + config.carried) * math.ceil(work.tokens / degrees.ranks) * config.dim * 4
        passing = (slices + stages - 1) * (items / slices * stream / machine.link + machine.latency)
    one_pass = compute * items / slices + exchange * items / slices + waits
    weights = slices * _waiting_for_weights(blocks or Blocks(), layers, one_pass, machine)
    return Expected(
        compute=items * compute,
        exchange=items * exchange + slices * waits + passing,
        weights=weights,
        idle=(stages - 1) * (one_pass + weights / slices),
    )


def block_flops(config: Dimensions, tokens: int, ranks: int = 1, tensor: int = 1) -> tuple[float, float]:
    """Floating-point operations of one block for one item on a rank: of products, and of attention.

    Every rank computes keys and values of the text, the image and what is heard itself. What only some blocks have
    counts by its mean. One speaker is counted; how InfiniteTalk tells two apart takes 2 % more at 480p.
    """
    d, own, heard = config.dim, math.ceil(tokens / ranks), config.hearing
    context = TEXT_TOKENS + ((config.image_positions or IMAGE_TOKENS) if config.image_dim else 0)
    products = 2 * own * (6 * d * d + 2 * d * config.ffn_dim) + 2 * context * 2 * d * d
    attention = 4 * tokens * tokens * d / ranks + 4 * own * context * d
    keys = math.ceil(tokens / _FRAME_TOKENS) * heard.tokens
    products += heard.share * (2 * own * 2 * d * d + 2 * keys * heard.width * 2 * d)
    attention += heard.share * 4 * own * heard.tokens * d
    return products / tensor, attention / tensor


def _block_compute(
    config: Dimensions, plan: ParallelPlan, degrees: SequenceDegrees, work: Work, machine: Machine
) -> float:
    """Seconds of one item in one block; a ring's smaller pieces, uneven heads and unlike GPUs included."""
    tensor, pace = plan.tensor_parallel, plan.token_cost(work.tokens, degrees.ranks)
    products, attention = block_flops(config, work.tokens, degrees.ranks, tensor)
    products *= pace
    attention *= plan.attention_cost(degrees, config.num_heads // tensor)
    moved = _MEMORY_BYTES + _HEARD_BYTES * config.hearing.share
    moved *= math.ceil(work.tokens / degrees.ranks) * config.dim * pace
    moved *= (1 + 1 / tensor) / 2  # the residual stream is whole on each tensor-parallel rank
    scale = work.itemsize / 2  # of float32 products, which are several times slower than 16 bit ones on most GPUs
    return scale * (products / machine.products + attention / machine.attention) + moved / machine.memory


def _block_exchange(
    config: Dimensions, degrees: SequenceDegrees, tensor: int, work: Work, machine: Machine
) -> float:
    """Seconds in which one item's bytes of one block travel and nothing is computed."""
    own = math.ceil(work.tokens / degrees.ranks) * config.dim * work.itemsize
    ulysses, ring = degrees.ulysses, degrees.ring
    heads = 4 * own / tensor * (ulysses - 1) / ulysses / machine.link
    if work.overlap and ring == 1:
        heads *= _EXPOSED_HEADS
    around = 2 * own / tensor * (ring - 1) / machine.link
    if work.overlap:
        _, attention = block_flops(config, work.tokens, degrees.ranks, tensor)
        around = max(0.0, around - attention / machine.attention * (ring - 1) / ring)
    sums = _SUMS - (_HIDDEN_SUMS if work.overlap else 0) + config.hearing.share
    return heads + around + sums * own * 2 * (tensor - 1) / tensor / machine.link


def _exchanges(config: Dimensions, degrees: SequenceDegrees, tensor: int) -> float:
    """How often a block waits for other ranks: around attention, in a ring, for sums and for the norms' means."""
    sums = 6 + config.hearing.share if tensor > 1 else 0
    return 2 * (degrees.ulysses > 1) + (degrees.ring - 1) + sums


def _waiting_for_weights(blocks: Blocks, layers: int, seconds: float, machine: Machine) -> float:
    """Seconds of a pass of `seconds` through `layers` blocks in which their weights have not arrived, or cost it."""
    gathers = layers * (blocks.nbytes * (blocks.share - 1) / blocks.share / machine.link)
    gathers += layers * machine.latency if blocks.share > 1 else 0.0
    copies = blocks.hosted * blocks.nbytes / blocks.share / machine.host
    return max(0.0, gathers + copies - seconds) + _GATHER_COST * min(gathers, seconds)
