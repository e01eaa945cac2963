"""How many bytes a model needs on every rank of a pool, and where its weights go; all ranks compute the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.weight_source import DTYPES, WEIGHT_DTYPES, WeightSource, storage_bytes
from ..parallel.model_division import sparse_bytes_on_rank
from ..parallel.pipeline import Stage
from ..parallel.tensor import TensorShard
from ..plan.degrees import ParallelPlan
from ..plan.placement import (
    REFERENCE_TOKENS,
    Demand,
    Placement,
    activation_bytes,
    choose_placement,
    demand_of,
    fitting_blocks,
    room_beside,
)
from ..protocol.specs import ModelSpec
from .device_memory import rounding_unit


@dataclass(frozen=True)
class Video:
    """The video beside which the weights of a model must fit.

    Args:
        tokens: of the whole video; 0 is 81 frames at 480p.
        sparse: whether its self-attention is sparse.
    """

    tokens: int = 0
    sparse: bool = False


def place_model(
    source: WeightSource,
    spec: ModelSpec,
    plan: ParallelPlan,
    video: Video,
    rooms: Sequence[int],
    host_room: int,
    device: torch.device,
) -> dict[tuple[int, ...], tuple[Demand, Placement]]:
    """The demand and the placement of each part of a model, by the ranks that hold the part.

    Every rank computes the placement of all parts, so that all ranks refuse alike, and know which ranks share blocks.

    Args:
        video: beside which the weights must fit.
        rooms: bytes that each rank's device has for the model, by rank.
        host_room: bytes of host memory that all ranks together may take.
        device: the device of one rank, for the kind of device.

    Raises:
        PlacementError: a part does not fit.
    """
    placed = {}
    for ranks in plan.replicas():
        sizes = sizes_on_rank(source, spec, plan, ranks[0])
        activations = {rank: activations_on_rank(spec, source.config, plan, video, rank) for rank in ranks}
        demand = demand_of(sizes, source.config, max(activations.values()), rounding_unit(device))
        there = room_beside([rooms[rank] for rank in ranks], list(activations.values()))
        on_host = host_room * len(ranks) // plan.num_gpus
        placement = choose_placement(demand, there, len(ranks), spec.shard_weights, spec.offload, on_host, ranks)
        placed[ranks] = demand, placement
    return placed


def sizes_on_rank(source: WeightSource, spec: ModelSpec, plan: ParallelPlan, rank: int) -> dict[str, int]:
    """Bytes of a rank's part of each weight that its pipeline stage has, by name."""
    coordinates, shapes = plan.mesh.coords(rank), source.config.shapes()
    shard = TensorShard(plan.tensor_parallel, coordinates.tensor)
    stage = Stage.of(coordinates.stage, plan.pipeline_parallel)
    sizes = storage_bytes(source.config, source.header, WEIGHT_DTYPES[spec.weight_dtype])
    return {
        name: sizes[name] * math.prod(shard.held_shape(name, shape)) // math.prod(shape)
        for name, shape in shapes.items()
        if stage.holds(name, source.config)
    }


def activations_on_rank(spec: ModelSpec, config: WanConfig, plan: ParallelPlan, video: Video, rank: int) -> int:
    """Expected bytes of a rank's activations for a video."""
    tokens = video.tokens or REFERENCE_TOKENS
    share, itemsize = plan.tokens_of(rank, tokens), DTYPES[spec.compute_dtype].itemsize
    own = activation_bytes(config, share, spec.max_batch, itemsize, spec.slice_tokens)
    return own + (spec.max_batch * sparse_bytes_on_rank(config, plan, tokens) if video.sparse else 0)


def resident_blocks(spec: ModelSpec, demand: Demand, placement: Placement, room: int) -> int:
    """How many blocks stay on a rank's device of `room` bytes, which may have more room than the tightest one."""
    if spec.offload == "on" or placement.resident == demand.blocks:
        return placement.resident
    return max(0, fitting_blocks(demand, room, placement.share))
