"""What PipeFusion keeps, known and refused before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny
from testkit.tiny import sentences
from wan_parallel.distributed.approximate.displaced_memory import TooLarge, host_memory
from wan_parallel.distributed.approximate.pipefusion import PatchStream
from wan_parallel.distributed.approximate.pipefusion_memory import kept_bytes, stream_memory
from wan_parallel.distributed.approximate.schedule import FILL
from wan_parallel.distributed.parallel.pipeline import Stage
from wan_parallel.distributed.parallel.sequence import place_in
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.nodes.model.stream_runs import BESIDE, Beside, StreamRuns
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
    group = place_in(degrees, 0, plan.sequence_groups(ranks))
    span = Stage.of(0, plan.pipeline_parallel).span(config.num_layers)
    model = SimpleNamespace(config=config, compute_dtype=torch.bfloat16, span=span)
    attentions = len(span) + contexts * len(config.side_blocks(span))
    items = -(-batch // plan.data_parallel) if batch >= plan.data_parallel else batch
    stream, heads = PatchStream(plan.pipeline_parallel, torch.device("cpu")), config.num_heads // plan.tensor_parallel
    names = tuple(map(str, range(items)))
    stream.begin(Displaced(FILL, "run", names, PatchSplit()), attentions)
    room = stream._room(items, model, grid, group, heads)
    allocated = sum(tensor.nbytes for tensor in room)
    assert kept_bytes(config, streaming(plan), "bf16", grid.tokens, batch, contexts) == allocated
    assert stream.missing_bytes([names], model, grid, group, heads) == allocated
    stream._kept[names] = room
    assert stream.missing_bytes([names], model, grid, group, heads) == 0


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


def test_a_run_that_does_not_fit_is_refused_before_anything_starts():
    size = (2, 16, 21, 60, 104)
    plan = ParallelPlan(2, pipeline_parallel=2)
    fraction = 2 * 20 * GIB / host_memory()  # 20 GiB for each worker; keys and values of two branches take 25
    pool = SimpleNamespace(settings=streaming(plan, fraction), launcher_pid=0)
    runs = StreamRuns(PRESETS["14b"], ModelSpec("random:14b"), pool)
    options = {"sample_sigmas": torch.ones(21)}
    with pytest.raises(TooLarge) as refusal:
        runs.check(size, options)
    text = str(refusal.value)
    assert sentences(text) == 2
    for said in ("keys and values 25.0 GiB", "a worker may take 20.0 GiB", "pipeline_mode to exact", "fewer frames"):
        assert said in text
    runs.check((1, *size[1:]), options)  # one branch fits
    runs.check(size, {"sample_sigmas": torch.ones(5)})  # four steps are all exact, and nothing is kept
    runs.check(size, {**options, "context_window": object()})


def test_the_second_branch_is_counted_with_the_first():
    config, latent = tiny.TINY, torch.ones(1, 16, 3, 8, 8)
    settings = streaming(ParallelPlan(2, pipeline_parallel=2))
    spec = ModelSpec("x", "fp32", "fp32")
    kept = kept_bytes(config, settings, "fp32", 48, 1)
    least = stream_memory(config, settings, spec, 48, kept).total + kept // 2
    pool = SimpleNamespace(settings=streaming(settings.plan, 2 * least / host_memory()), launcher_pid=0)
    runs = StreamRuns(config, spec, pool)

    def step(branch: str, timestep: float) -> None:
        options = {"uuids": [branch], "cond_or_uncond": [0], "sample_sigmas": torch.ones(21)}
        with runs.step(latent * timestep / 900, torch.tensor([timestep]), options, "") as displaced:
            assert displaced is not None

    step("positive", 900.0)
    step("positive", 899.0)
    with pytest.raises(TooLarge):
        step("negative", 900.0)


def test_a_branch_with_other_videos_beside_it_begins_anew_and_takes_more():
    latent, settings = torch.ones(1, 16, 3, 8, 8), streaming(ParallelPlan(2, pipeline_parallel=2))
    runs = StreamRuns(tiny.VACE, ModelSpec("x", "fp32", "fp32"), SimpleNamespace(settings=settings, launcher_pid=0))

    def step(number: int, *beside: int) -> str:
        options = {"uuids": ["a"], "cond_or_uncond": [0], "sample_sigmas": torch.ones(21), BESIDE: Beside(*beside)}
        with runs.step(latent * (1 + number / 100), torch.tensor([900.0 - number]), options, "") as displaced:
            return displaced.kind

    assert [step(number, 1) for number in range(6)] == ["exact", "exact", "exact", "fill", "stale", "stale"]
    assert step(6, 2) == step(7, 2, 10) == "exact"
    kept = [kept_bytes(tiny.VACE, settings, "fp32", *size) for size in ((48, 1, 1), (48, 1, 2), (58, 1, 2))]
    assert list(runs._kept.values()) == kept
