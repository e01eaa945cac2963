"""How long a forward is expected to take under a plan: arithmetic, bytes over the links, waiting. Numbers only.

The expectation serves to compare plans. All plans do the same arithmetic; they differ in how evenly ranks share the
arithmetic, in the bytes that ranks send each other, and in the weights that have not arrived when a block needs them.
The constants were measured on 4 H200s, where the expected time is within 10 % of the measured time (see
tests/distributed/planner/test_cost.py). The rates of a machine are measured when its workers start (see probe.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...wanvideo.base.config import WanConfig
from ..plan.degrees import ParallelPlan, SequenceDegrees, bounds
from ..protocol.machine import Machine

TEXT_TOKENS = 512
IMAGE_TOKENS = 257
"""Tokens of a start image, where a model has no positions for more."""
_FRAME_TOKENS = 30 * 52
"""Tokens of a latent frame at 480p. The number of frames, on which little depends, is estimated from the tokens."""
_MEMORY_BYTES = 70
"""Bytes that go through memory for each token, channel and block outside products and attention (benchmarks/LOG.md,
4)."""
_SIDE_ATTENTION_BYTES = 20
"""Bytes that go through memory for each token and channel of a block whose tokens attend to audio: the norm, a copy of
the attention's output, and the sum."""
_HOP_SECONDS = 6e-3
"""Seconds of the way from ComfyUI to the workers and back."""
_SUMS, _HIDDEN_SUMS = 3, 1
"""Sums over tensor-parallel ranks in a block, and how many of the sums are hidden: of two sums, half travels while
other tokens are computed (see tensor.py). An attention beside those of every Wan model needs one sum more."""
_EXPOSED_HEADS = 0.3
"""The part of the time of Ulysses' exchange that a forward takes longer although the exchange runs beside computation
(see ulysses_overlap.py): 14B at 480p on 2 H200s through host memory takes 1.364 s with the overlap and 1.760 s without
it (benchmarks/LOG.md, 12)."""
_GATHER_COST = 0.5
"""The part of the time of a gather of weights that a forward takes longer although the gather runs beside computation:
NCCL's kernels take multiprocessors from the computation (benchmarks/LOG.md, 5)."""


@dataclass(frozen=True)
class Work:
    """One forward, as the expectation needs it.

    Args:
        tokens: tokens of one batch item.
        items: branches of cfg times videos.
        itemsize: bytes of the compute dtype.
        max_batch: items that go through the model at once.
        overlap: see `PoolSettings`.
        self_attention: time of self-attention relative to dense attention, which sparse attention makes shorter.
    """

    tokens: int
    items: int = 1
    itemsize: int = 2
    max_batch: int = 1
    overlap: bool = True
    self_attention: float = 1.0


@dataclass(frozen=True)
class Blocks:
    """Where a rank's blocks lie: the rank keeps 1/share of the `nbytes` of each block, `hosted` of them in host
    memory."""

    nbytes: int = 0
    share: int = 1
    hosted: int = 0


@dataclass(frozen=True)
class Expected:
    """Seconds of a forward, by what they are spent on. In `idle` seconds a pipeline stage has no work."""

    compute: float
    exchange: float
    weights: float
    idle: float

    @property
    def seconds(self) -> float:
        """Seconds of the forward, from ComfyUI's process to the workers and back."""
        return self.compute + self.exchange + self.weights + self.idle + _HOP_SECONDS


def expect(
    config: WanConfig, plan: ParallelPlan, work: Work, machine: Machine, blocks: Blocks | None = None
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
    layers = max(len(config.run_order(span)) for span in spans)  # VACE with one context
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


def block_flops(config: WanConfig, tokens: int, ranks: int = 1, tensor: int = 1) -> tuple[float, float]:
    """Floating-point operations of one block for one batch item on a rank: those of products, and those of attention.

    Every rank computes all keys and values of the text, the image and the audio. A part that only some blocks have is
    counted by its mean over all blocks. One speaker is counted; telling two speakers apart takes 2 % more at 480p
    (InfiniteTalk).
    """
    d, own, side = config.dim, math.ceil(tokens / ranks), config.side_attention
    context = TEXT_TOKENS + ((config.image_positions or IMAGE_TOKENS) if config.image_dim else 0)
    products: float = 2 * own * (6 * d * d + 2 * d * config.ffn_dim) + 2 * context * 2 * d * d
    attention = 4 * tokens * tokens * d / ranks + 4 * own * context * d
    keys = math.ceil(tokens / _FRAME_TOKENS) * side.tokens
    products += side.share * (2 * own * 2 * d * d + 2 * keys * side.width * 2 * d)
    attention += side.share * 4 * own * side.tokens * d
    return products / tensor, attention / tensor


def _block_compute(
    config: WanConfig, plan: ParallelPlan, degrees: SequenceDegrees, work: Work, machine: Machine
) -> float:
    """Seconds that one item takes to compute in one block; smaller pieces of a ring, uneven heads and unlike GPUs
    included."""
    tensor, pace = plan.tensor_parallel, plan.token_cost(work.tokens, degrees.ranks)
    products, attention = block_flops(config, work.tokens, degrees.ranks, tensor)
    products *= pace
    among_tokens = 4 * work.tokens * work.tokens * config.dim / degrees.ranks / tensor
    attention -= (1 - work.self_attention) * among_tokens
    attention *= plan.attention_cost(degrees, config.num_heads // tensor)
    moved = _MEMORY_BYTES + _SIDE_ATTENTION_BYTES * config.side_attention.share
    moved *= math.ceil(work.tokens / degrees.ranks) * config.dim * pace
    moved *= (1 + 1 / tensor) / 2  # the residual stream is whole on each tensor-parallel rank
    scale = work.itemsize / 2  # of float32 products, which are several times slower than 16 bit ones on most GPUs
    return scale * (products / machine.products + attention / machine.attention) + moved / machine.memory


def _block_exchange(config: WanConfig, degrees: SequenceDegrees, tensor: int, work: Work, machine: Machine) -> float:
    """Seconds of one item in one block in which bytes travel between ranks and nothing is computed."""
    own = math.ceil(work.tokens / degrees.ranks) * config.dim * work.itemsize
    ulysses, ring = degrees.ulysses, degrees.ring
    heads = 4 * own / tensor * (ulysses - 1) / ulysses / machine.link
    if work.overlap and ring == 1:
        heads *= _EXPOSED_HEADS
    around = 2 * own / tensor * (ring - 1) / machine.link
    if work.overlap:
        _, attention = block_flops(config, work.tokens, degrees.ranks, tensor)
        around = max(0.0, around - attention / machine.attention * (ring - 1) / ring)
    sums = _SUMS - (_HIDDEN_SUMS if work.overlap else 0) + config.side_attention.share
    return heads + around + sums * own * 2 * (tensor - 1) / tensor / machine.link


def _exchanges(config: WanConfig, degrees: SequenceDegrees, tensor: int) -> float:
    """How often a block waits for other ranks: around attention, in a ring, for sums and for the norms' means."""
    sums = 6 + config.side_attention.share if tensor > 1 else 0
    return 2 * (degrees.ulysses > 1) + (degrees.ring - 1) + sums


def _waiting_for_weights(blocks: Blocks, layers: int, seconds: float, machine: Machine) -> float:
    """Seconds that weights add to a pass through `layers` blocks which takes `seconds` by itself: the time for which
    blocks wait for their weights, and the time that gathers take from computation."""
    gathers = layers * (blocks.nbytes * (blocks.share - 1) / blocks.share / machine.link)
    gathers += layers * machine.latency if blocks.share > 1 else 0.0
    copies = blocks.hosted * blocks.nbytes / blocks.share / machine.host
    return max(0.0, gathers + copies - seconds) + _GATHER_COST * min(gathers, seconds)
