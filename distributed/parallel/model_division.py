"""How a plan divides a model: whether the plan can divide it at all, and how many bytes the fullest rank then holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ...wanvideo.base.attention_choice import sparse_bytes
from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.weight_source import WEIGHT_DTYPES, storage_bytes_of
from ..plan.degrees import ParallelPlan, PlanError, divisors
from ..protocol.specs import ModelSpec, PoolSettings
from .pipeline import Stage
from .tensor import TensorShard


def check_plan(config: WanConfig, spec: ModelSpec, settings: PoolSettings) -> None:
    """Check that a model can be run as its spec and the pool's settings ask.

    Raises:
        PlanError: the model cannot be run so. The text says why, and which settings can run it.
    """
    plan = settings.plan
    plan.check_model(config.num_heads, config.num_layers)
    for heads, layers in filter(None, (variant.own_heads() for variant in config.variants)):
        if heads % plan.tensor_parallel:
            possible = divisors(math.gcd(heads, config.num_heads))
            raise PlanError(
                f"tensor_parallel_size {plan.tensor_parallel} does not divide the {heads} heads of {layers}. "
                f"Use one of {', '.join(map(str, possible))}."
            )


def held_parameters(config: WanConfig, plan: ParallelPlan) -> int:
    """How many of a model's parameters the rank with the most parameters holds."""
    return _of_largest_part(config, plan, {name: math.prod(shape) for name, shape in config.shapes().items()})


def most_held(config: WanConfig, spec: ModelSpec, plan: ParallelPlan) -> int:
    """How many bytes of a model's weights the rank with the most bytes holds."""
    sizes = storage_bytes_of(spec.path, WEIGHT_DTYPES[spec.weight_dtype], spec.module, in_dim=spec.in_dim)
    return _of_largest_part(config, plan, sizes)


def _of_largest_part(config: WanConfig, plan: ParallelPlan, sizes: Mapping[str, int]) -> int:
    return max(sum(part.values()) for part in parts_of(config, plan, sizes))


def parts_of(config: WanConfig, plan: ParallelPlan, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """For each pipeline stage, the size of each tensor on the rank that holds the largest part, by name.

    `sizes` has the sizes of the whole tensors by name, in bytes or in elements.
    """
    shard, shapes = TensorShard(plan.tensor_parallel), config.shapes()
    stages = [Stage.of(i, plan.pipeline_parallel) for i in range(plan.pipeline_parallel)]
    parts = {
        name: size * math.prod(shard.held_shape(name, shapes[name])) // math.prod(shapes[name])
        for name, size in sizes.items()
    }
    return [{name: n for name, n in parts.items() if stage.holds(name, config)} for stage in stages]


def sparse_bytes_on_rank(config: WanConfig, plan: ParallelPlan, tokens: int) -> int:
    """Bytes that sparse attention to the `tokens` tokens of one video takes on the rank with most heads."""
    heads = math.ceil(config.num_heads / (plan.tensor_parallel * plan.sequence_ranks))
    return sparse_bytes(tokens, heads)


def without_ring(plan: ParallelPlan, num_heads: int, what: str) -> ParallelPlan:
    """The plan for attention that needs all keys of a head on one GPU.

    This plan where it has no ring, else one without a ring, if the degrees are left open.

    Args:
        what: needs them, in words that begin a sentence.

    Raises:
        PlanError: the degrees that are set leave a ring.
    """
    sizes = {plan.sequence_ranks, plan.sequence_ranks * plan.data_parallel}
    if all(plan.sequence_degrees(num_heads, ranks).ring == 1 for ranks in sizes):
        return plan
    if plan.ring_degree > 1 or plan.ulysses_degree not in (0, plan.sequence_ranks):
        raise PlanError(
            f"{what} needs all keys of a head on one GPU, and the plan has a ring ({plan.describe(num_heads)}). "
            "Set ulysses_degree and ring_degree to 0, or do without it."
        )
    if num_heads // plan.tensor_parallel < max(sizes):
        raise PlanError(
            f"{what} needs all keys of a head on one GPU, and {num_heads // plan.tensor_parallel} heads are too few "
            f"for {max(sizes)} GPUs. Use fewer GPUs, or do without it."
        )
    return replace(plan, ring_degree=1)
