"""What PipeFusion keeps, known and refused before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from wan_parallel.distributed.approximate.pipefusion_memory_estimate import kept_bytes, stream_memory
from wan_parallel.distributed.approximate.schedule import FILL
from wan_parallel.distributed.approximate.strategies.pipefusion import StreamedStep
from wan_parallel.distributed.parallel.pipeline import Stage
from wan_parallel.distributed.parallel.sequence_group import group_of
from wan_parallel.distributed.parallel.strategy import StepInputs
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.conditioning import NOTHING
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.grid import Grid
from wan_parallel.wanvideo.variants.vace import Vace

GIB = 2**30
P480 = Grid(21, 30, 52)
SMALL = WanConfig(dim=1280, ffn_dim=512, num_heads=10, num_layers=5)
VACE = SMALL.having(Vace(3, 12), num_layers=6)
PLANS = [
    ParallelPlan(2, pipeline_parallel=2),
    ParallelPlan(4, pipeline_parallel=4),
    ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2),
    ParallelPlan(8, pipeline_parallel=2, ulysses_degree=4),  # heads that do not divide
    ParallelPlan(4, pipeline_parallel=2, data_parallel=2),
]


def streaming(plan: ParallelPlan, fraction: float = 1.0) -> PoolSettings:
    return PoolSettings(plan, "cpu", fraction, pipeline_mode="pipefusion")


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.describe(10))
@pytest.mark.parametrize("batch, config, contexts", [(1, SMALL, 0), (2, SMALL, 0), (3, SMALL, 0), (2, VACE, 2)])
def test_the_figure_is_what_the_first_rank_allocates(plan, batch, config, contexts):
    grid, ranks = Grid(2, 3, 4), plan.group_ranks(batch)
    degrees = plan.sequence_degrees(config.num_heads, ranks)
    group = group_of(degrees, 0, plan.sequence_groups(ranks))
    span = Stage.of(0, plan.pipeline_parallel).span(config.num_layers)
    attentions = len(span) + contexts * len(config.side_blocks(span))
    model = SimpleNamespace(
        config=config, compute_dtype=torch.bfloat16, span=span, self_attentions=lambda *_forward: attentions
    )
    items = -(-batch // plan.data_parallel) if batch >= plan.data_parallel else batch
    names, kept = tuple(map(str, range(items))), {}
    inputs = StepInputs(model, NOTHING, grid, group, [slice(0, items)])
    fill, heads = Displaced(FILL, "run", names, PatchSplit()), config.num_heads // plan.tensor_parallel
    step = StreamedStep(kept, inputs, fill, plan.pipeline_parallel, heads, torch.device("cpu"))
    room = step.allocate(items)
    allocated = sum(tensor.nbytes for tensor in room)
    assert kept_bytes(config, streaming(plan), "bf16", grid.tokens, batch, contexts) == allocated
    assert step.new_bytes == allocated
    kept[names] = room
    assert step.new_bytes == 0


@pytest.mark.parametrize("stages, tensor", [(2, 1), (4, 1), (2, 2)])
def test_the_guide_says_what_one_branch_of_the_14b_takes(stages, tensor):
    plan = ParallelPlan(stages * tensor, pipeline_parallel=stages, tensor_parallel=tensor)
    kept = kept_bytes(PRESETS["14b"], streaming(plan), "bf16", P480.tokens, 1)
    assert kept * stages * tensor == pytest.approx(25 * GIB, rel=0.01)


def test_weights_that_can_leave_count_less():
    plan, spec = ParallelPlan(4, pipeline_parallel=2), ModelSpec("random:14b")
    config, settings = PRESETS["14b"], streaming(ParallelPlan(4, pipeline_parallel=2))
    needs = {
        (shard, offload): stream_memory(
            config, settings, replace(spec, shard_weights=shard, offload=offload), P480.tokens, 0
        ).weights
        for shard in ("auto", "off")
        for offload in ("auto", "off")
    }
    assert needs["off", "off"] == pytest.approx(13.5 * GIB, rel=0.01)
    assert needs["auto", "off"] == pytest.approx(needs["off", "off"] / plan.sequence_ranks + 1.3 * GIB, rel=0.05)
    assert needs["auto", "auto"] == needs["off", "auto"] < 2 * GIB
