"""Which forwards of a MODEL's sampling runs take part in displaced patches, and which runs are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.approximate import kv_buffers
from wan_parallel.distributed.approximate.displaced_memory_estimate import TooLarge
from wan_parallel.distributed.approximate.schedule import PatchSettings
from wan_parallel.distributed.client.displaced_runs import DisplacedRuns
from wan_parallel.distributed.client.sampling_runs import SampledForward
from wan_parallel.distributed.parallel.sequence_group import MissingPackage
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit, PlanError
from wan_parallel.distributed.protocol.reports import Exchange
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings

SETTINGS = PatchSettings(PatchSplit("spatial", 32), warmup_steps=2, sync_frequency=10)
LATENT = torch.ones(1, 16, 3, 8, 8)


def runs_of(num_gpus: int = 2, fraction: float = 1.0, data_parallel: int = 1, **settings: object) -> DisplacedRuns:
    """On a stand-in for a pool, of which nothing but settings and results is read."""
    plan = ParallelPlan(num_gpus, data_parallel=data_parallel)
    exchange = Exchange("native", 100, 1.0, 0.5, 10)
    pool = SimpleNamespace(
        settings=PoolSettings(plan, "cpu", fraction),
        launcher_pid=1,
        last=SimpleNamespace(exchanges=(exchange,) * num_gpus),
    )
    return DisplacedRuns(replace(SETTINGS, **settings), tiny.TINY, ModelSpec("x", "fp32", "fp32"), pool)


def asked(*branches: str, steps: int = 8, **more: object) -> SampledForward:
    return SampledForward(branches, steps, **more)


def kinds(
    runs: DisplacedRuns, forwards: Sequence[SampledForward], x: torch.Tensor = LATENT, patches: str = ""
) -> list[str | None]:
    """The kinds of successive forwards, with a latent that is denoised a little each time."""
    found = []
    for step, forward in enumerate(forwards):
        now = x * (1 + 0.01 * step)
        with runs.step(now, torch.full((len(x),), 900.0 - step), forward, patches, lambda nbytes: None) as displaced:
            found.append(displaced and displaced.kind)
    return found


def test_warm_up_then_stale_steps_and_a_new_run_warms_up_again():
    runs = runs_of()
    for _ in range(2):
        runs.begin()
        assert kinds(runs, [asked("a")] * 5) == ["exact", "fill", "stale", "stale", "stale"]
    assert (len(runs.record.synchronous), len(runs.record.stale)) == (2, 3)
    assert runs.record.received == 300 and runs.record.last.index == 4


def test_a_vace_model_runs_exactly():
    runs = runs_of()
    runs.config = tiny.VACE
    assert kinds(runs, [asked("a")] * 4) == [None] * 4
    assert "VACE" in runs.record.exact_because


def test_the_samplers_frequency_wins_over_the_loaders():
    assert kinds(runs_of(), [asked("a", sync_frequency=1)] * 4) == ["exact"] * 4
    often = kinds(runs_of(), [asked("a", sync_frequency=2)] * 6)
    assert often == ["exact", "fill", "stale", "fill", "stale", "fill"]


@pytest.mark.parametrize(
    "gpus, given, why",
    [
        (2, asked("a", in_context_window=True), "context windows"),
        (2, asked("a", steps=2), "no more steps than the warm-up"),
        (2, asked(), "branches cannot be told apart"),
        (1, asked("a"), "one GPU to itself"),
        (2, asked("a", skips_blocks=True), "SkipLayerGuidanceDiT"),
        (2, asked("a", two_speakers=True), "two speakers"),
    ],
)
def test_where_the_method_has_no_place_every_forward_is_exact(gpus, given, why):
    runs = runs_of(gpus)
    assert kinds(runs, [given] * 4) == [None] * 4
    assert why in runs.record.exact_because and len(runs.record.synchronous) == 4


def test_a_forward_that_fails_or_is_cancelled_starts_the_run_anew():
    runs = runs_of()
    kinds(runs, [asked("a")] * 3)
    with (
        pytest.raises(KeyboardInterrupt),
        runs.step(LATENT, torch.tensor([800.0]), asked("a"), "", lambda nbytes: None),
    ):
        raise KeyboardInterrupt  # as ComfyUI's interrupt, it is no Exception
    assert kinds(runs, [asked("a")] * 2) == ["exact", "fill"]


def test_a_lora_or_a_new_pool_starts_the_run_anew():
    runs = runs_of()
    assert kinds(runs, [asked("a")] * 3)[-1] == "stale"
    assert kinds(runs, [asked("a")], patches="lora") == ["exact"]
    runs.pool.launcher_pid = 2
    assert kinds(runs, [asked("a")], patches="lora") == ["exact"]


def test_branches_in_forwards_of_their_own_add_up_and_warm_up_apart():
    runs = runs_of()
    assert kinds(runs, [asked("p"), asked("n")] * 3) == ["exact"] * 2 + ["fill"] * 2 + ["stale"] * 2
    assert runs.record.branches == 2


@pytest.mark.parametrize("data_parallel, ways", [(1, "split_cfg"), (2, "kv_buffers")])
def test_a_video_whose_buffers_do_not_fit_is_refused_before_it_starts(data_parallel, ways):
    runs = runs_of(4, fraction=1e-4, data_parallel=data_parallel)
    size = (2, 16, 101, 64, 64)
    with pytest.raises(TooLarge) as refusal:
        runs.check(size, asked("p", "n"))
    assert ways in str(refusal.value) and ("split_cfg" in str(refusal.value)) == (data_parallel == 1)
    runs.check(size, asked("p", "n", sync_frequency=1))  # exact: needs no buffers
    runs.check(size, asked("p", "n", steps=2))


def test_a_video_that_cannot_be_cut_is_refused_before_it_starts():
    with pytest.raises(PlanError, match="4 GPUs cannot share"):
        runs_of(4).check(tuple(LATENT.shape), asked("p"))


def test_the_official_manager_is_refused_in_the_loader_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(kv_buffers, "official_version", str)
    with pytest.raises(MissingPackage, match="Run: pip install --no-deps"):
        runs_of(manager="official")
