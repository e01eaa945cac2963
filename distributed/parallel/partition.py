"""What a plan makes of a model: whether it can be divided like this, and how much of it the largest rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...wanvideo.base.config import WanConfig
from ...wanvideo.checkpoint.weight_source import WEIGHT_DTYPES, storage_bytes_of
from ..plan.degrees import ParallelPlan, PlanError, divisors
from ..protocol.specs import ModelSpec, PoolSettings
from .pipeline import Stage
from .tensor import TensorShard


def check_plan(config: WanConfig, spec: ModelSpec, settings: PoolSettings) -> None:
    """Check that a model can be run like this.

    Raises:
        PlanError: it cannot. The text says why and what can.
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
    """Parameters on the rank that has most of them."""
    return _of_largest_part(config, plan, {name: math.prod(shape) for name, shape in config.shapes().items()})


def most_held(config: WanConfig, spec: ModelSpec, plan: ParallelPlan) -> int:
    """Bytes of weights on the rank that has most of them."""
    return _of_largest_part(config, plan, storage_bytes_of(spec.path, WEIGHT_DTYPES[spec.weight_dtype], spec.module))


def _of_largest_part(config: WanConfig, plan: ParallelPlan, sizes: Mapping[str, int]) -> int:
    return max(sum(part.values()) for part in parts_of(config, plan, sizes))


def parts_of(config: WanConfig, plan: ParallelPlan, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """What is held of `sizes` of the whole tensors, by the rank of each stage that has the largest part."""
    shard, shapes = TensorShard(plan.tensor_parallel), config.shapes()
    stages = [Stage.of(i, plan.pipeline_parallel) for i in range(plan.pipeline_parallel)]
    parts = {
        name: size * math.prod(shard.held_shape(name, shapes[name])) // math.prod(shapes[name])
        for name, size in sizes.items()
    }
    return [{name: n for name, n in parts.items() if stage.holds(name, config)} for stage in stages]
