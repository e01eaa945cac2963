"""How much of each GPU's memory PipeFusion needs, computed before anything is allocated.

A stage keeps the keys and values of all tokens for its own blocks, for each batch item of a sampling run. Weights can
be offloaded to host memory to make room for keys and values, so only weights that must be on the GPU count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.header import Header
from ...wanvideo.checkpoint.weight_source import DTYPES, WEIGHT_DTYPES, storage_bytes
from ..parallel.model_division import parts_of
from ..parallel.pipeline import Stage
from ..plan.placement import activation_bytes, demand_of, needed_bytes
from ..protocol.specs import ModelSpec, PoolSettings
from .displaced_memory_estimate import TooLarge, capacity, gib

_RESERVE = 2
"""Placements reserve this many times what a forward works with (benchmarks/benchlib/simulation.py: 2.4 times). A
refusal must not count on more than is used."""


@dataclass(frozen=True)
class PipeFusionMemory:
    """Bytes on the GPU that needs most: weights that must be on the GPU, keys and values, and the tensors of a
    forward."""

    weights: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        """Bytes of all three together."""
        return self.weights + self.kept + self.working


def kept_bytes(
    config: WanConfig, settings: PoolSettings, compute_dtype: str, tokens: int, batch: int, contexts: int = 0
) -> int:
    """Bytes of the keys and values that the fullest rank keeps of `batch` items that one forward takes together.

    Args:
        contexts: control videos of VACE.
    """
    plan = settings.plan
    degrees = plan.sequence_degrees(config.num_heads, plan.group_ranks(batch))
    spans = (Stage.of(i, plan.pipeline_parallel).span(config.num_layers) for i in range(plan.pipeline_parallel))
    attentions = max(len(span) + contexts * len(config.side_blocks(span)) for span in spans)
    heads = math.ceil(config.num_heads // plan.tensor_parallel / degrees.ulysses)
    items = math.ceil(batch / plan.data_parallel) if batch >= plan.data_parallel else batch
    return 2 * items * tokens * heads * config.head_dim * DTYPES[compute_dtype].itemsize * attentions


def stream_memory(
    config: WanConfig, settings: PoolSettings, spec: ModelSpec, tokens: int, kept: int, header: Header | None = None
) -> PipeFusionMemory:
    """How much memory a sampling run needs that keeps `kept` bytes of keys and values.

    Args:
        header: the header of the model's file; None for random weights.
    """
    plan, itemsize = settings.plan, DTYPES[spec.compute_dtype].itemsize
    sizes = storage_bytes(config, header, WEIGHT_DTYPES[spec.weight_dtype])
    share = math.ceil(tokens / plan.sequence_ranks)
    working = activation_bytes(config, share, spec.max_batch, itemsize, spec.slice_tokens) // _RESERVE
    most = max(parts_of(config, plan, sizes), key=lambda part: sum(part.values()))
    demand = demand_of(most, config, 0)
    ways = [(1, demand.blocks)]
    if spec.offload != "off":
        ways.append((1, 0))
    if spec.shard_weights != "off" and len(plan.replicas()[0]) > 1:
        ways.append((len(plan.replicas()[0]), demand.blocks))
    weights = min(needed_bytes(demand, shares, resident) for shares, resident in ways)
    return PipeFusionMemory(weights, kept, working)


def check_stream(need: PipeFusionMemory, settings: PoolSettings) -> None:
    """Refuse a run whose keys and values do not fit.

    Raises:
        TooLarge: with the figures.
    """
    available = capacity(settings.device, settings.gpu_indices, settings.memory_fraction)
    if need.total <= available:
        return
    raise TooLarge(
        f"PipeFusion needs {gib(need.total)} on each GPU for this video (keys and values {gib(need.kept)}, weights "
        f"{gib(need.weights)}, working memory about {gib(need.working)}), and a worker may take {gib(available)}. "
        "Use fewer frames or a smaller size, more GPUs, raise gpu_memory_fraction, or set pipeline_mode to exact, "
        "which keeps none."
    )
