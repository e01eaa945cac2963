"""Which forwards of a MODEL's sampling runs take part in PipeFusion, and which runs are refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny
from testkit.tiny import sentences
from wan_parallel.distributed.approximate.displaced_memory_estimate import TooLarge, host_memory
from wan_parallel.distributed.approximate.pipefusion_memory_estimate import kept_bytes, stream_memory
from wan_parallel.distributed.client.pipefusion_runs import PipeFusionRuns
from wan_parallel.distributed.client.sampling_runs import SampledForward
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS

GIB = 2**30


def streaming(plan: ParallelPlan, fraction: float = 1.0) -> PoolSettings:
    return PoolSettings(plan, "cpu", fraction, pipeline_mode="pipefusion")


def no_room(nbytes: int) -> None:
    raise AssertionError("room is made on GPUs alone")


def test_a_run_that_does_not_fit_is_refused_before_anything_starts():
    size = (2, 16, 21, 60, 104)
    plan = ParallelPlan(2, pipeline_parallel=2)
    fraction = 2 * 20 * GIB / host_memory()  # 20 GiB for each worker; keys and values of two branches take 25
    pool = SimpleNamespace(settings=streaming(plan, fraction), launcher_pid=0)
    runs = PipeFusionRuns(PRESETS["14b"], ModelSpec("random:14b"), pool)
    forward = SampledForward(("p", "n"), steps=20)
    with pytest.raises(TooLarge) as refusal:
        runs.check(size, forward)
    text = str(refusal.value)
    assert sentences(text) == 2
    for said in ("keys and values 25.0 GiB", "a worker may take 20.0 GiB", "pipeline_mode to exact", "fewer frames"):
        assert said in text
    runs.check((1, *size[1:]), replace(forward, branch_ids=("p",)))  # one branch fits
    runs.check(size, replace(forward, steps=4))  # four steps are all exact, and nothing is kept
    runs.check(size, replace(forward, in_context_window=True))
    runs.check(size, replace(forward, two_speakers=True))
    runs.check(size, replace(forward, branch_ids=()))


def test_the_second_branch_is_counted_with_the_first():
    config, latent = tiny.TINY, torch.ones(1, 16, 3, 8, 8)
    settings = streaming(ParallelPlan(2, pipeline_parallel=2))
    spec = ModelSpec("x", "fp32", "fp32")
    kept = kept_bytes(config, settings, "fp32", 48, 1)
    least = stream_memory(config, settings, spec, 48, kept).total + kept // 2
    pool = SimpleNamespace(settings=streaming(settings.plan, 2 * least / host_memory()), launcher_pid=0)
    runs = PipeFusionRuns(config, spec, pool)

    def step(branch: str, timestep: float) -> None:
        forward = SampledForward((branch,), steps=20)
        with runs.step(latent * timestep / 900, torch.tensor([timestep]), forward, "", no_room) as displaced:
            assert displaced is not None and displaced.strategy == "pipefusion"

    step("positive", 900.0)
    step("positive", 899.0)
    with pytest.raises(TooLarge):
        step("negative", 900.0)


def test_a_branch_with_other_videos_beside_it_begins_anew_and_takes_more():
    latent, settings = torch.ones(1, 16, 3, 8, 8), streaming(ParallelPlan(2, pipeline_parallel=2))
    runs = PipeFusionRuns(tiny.VACE, ModelSpec("x", "fp32", "fp32"), SimpleNamespace(settings=settings, launcher_pid=0))

    def step(number: int, contexts: int, tokens: int = 0) -> str:
        forward = SampledForward(("a",), 20, vace_contexts=contexts, context_tokens=tokens)
        now = latent * (1 + number / 100)
        with runs.step(now, torch.tensor([900.0 - number]), forward, "", no_room) as displaced:
            return displaced.kind

    assert [step(number, 1) for number in range(6)] == ["exact", "exact", "exact", "fill", "stale", "stale"]
    assert step(6, 2) == step(7, 2, 10) == "exact"
    kept = [kept_bytes(tiny.VACE, settings, "fp32", *size) for size in ((48, 1, 1), (48, 1, 2), (58, 1, 2))]
    assert list(runs._kept.values()) == kept
