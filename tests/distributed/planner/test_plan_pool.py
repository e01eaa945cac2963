"""A pool whose plan is chosen: which one it takes, that results stay right while it changes, and what it says."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.planner.planner import Planner, Workload, room_of, slowest, speeds_of
from wan_parallel.distributed.protocol.machine import Machine
from wan_parallel.distributed.protocol.reports import DeviceProfile
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.lora import LowRank
from wan_parallel.wanvideo.model.model import WanModel

FIVE_LAYERS = WanConfig(dim=512, ffn_dim=512, num_heads=4, num_layers=5, text_dim=64)


class Script(Planner):
    """Names the plans that a test says, for whatever is asked."""

    plan: ParallelPlan

    def recall(self, config: WanConfig, workload: Workload, current: ParallelPlan) -> ParallelPlan | None:
        return current if current == self.plan else None

    def choose(self, *_asked: object) -> ParallelPlan:
        return self.plan


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("plan") / "five-layers.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, FIVE_LAYERS), "fp32", "fp32")


@pytest.fixture(scope="module")
def whole(model) -> WanModel:
    return WanModel.from_checkpoint(model.path)


@pytest.fixture(scope="module")
def scripted() -> Iterator[Pool]:
    """Four workers, whose plan a test sets with `pool._preparation.planner.plan`."""
    pool = Pool(PoolSettings(ParallelPlan(4), device="cpu", auto=True))
    pool._preparation.planner = Script(pool.settings)
    yield pool
    pool.close()


def test_two_items_go_to_two_groups_and_the_result_is_exact(model, whole, caplog):
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu", auto=True))
    given, single = tiny.inputs(FIVE_LAYERS, batch=2), tiny.inputs(FIVE_LAYERS)
    try:
        with caplog.at_level(logging.INFO):
            out = pool.forward(model, *given)
        assert pool.settings.plan == ParallelPlan(2, data_parallel=2)
        assert tiny.relative_error(out, whole(*given)) <= 2e-6
        said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Plan: ")]
        assert len(said) == 1 and "data 2 x Ulysses 1 x ring 1, for 2 items of 36 tokens" in said[0]
        status, pids = pool.status(), pool.worker_pids
        assert status.plan_reason in said[0] and status.settings.plan.data_parallel == 2
        for other in (single, given):
            assert tiny.relative_error(pool.forward(model, *other), whole(*other)) <= 2e-6
        assert pool.worker_pids == pids
    finally:
        pool.close()


def test_workers_go_from_plan_to_plan(scripted, model, whole):
    given, expected = tiny.inputs(FIVE_LAYERS, batch=3), whole(*tiny.inputs(FIVE_LAYERS, batch=3))
    plans = (
        {},
        {"data_parallel": 2},
        {"tensor_parallel": 2, "data_parallel": 2},
        {"pipeline_parallel": 2, "tensor_parallel": 2},
        {"pipeline_parallel": 2, "data_parallel": 2},
        {"ulysses_degree": 2},
    )
    pids = None
    for sizes in plans:
        scripted._preparation.planner.plan = ParallelPlan(4, **sizes)
        assert tiny.relative_error(scripted.forward(model, *given), expected) <= 2e-6, sizes
        assert scripted.settings.plan == scripted._preparation.planner.plan
        assert pids in (None, scripted.worker_pids)
        pids = scripted.worker_pids
        for worker in scripted.status().workers:
            held = worker.models[0]
            assert (held.pipeline, held.tensor) == tuple(
                getattr(scripted.settings.plan, name) for name in ("pipeline_parallel", "tensor_parallel")
            )


def test_speeds_change_what_each_worker_computes_and_nothing_else(scripted, model, whole):
    given = tiny.inputs(FIVE_LAYERS, batch=2)
    expected, held, pids = whole(*given), set(), set()
    for speeds in ((), (8, 1, 3, 2), (1, 2, 2, 1), ()):
        for sizes in ({}, {"ulysses_degree": 2}, {"data_parallel": 2}):
            scripted._preparation.planner.plan = ParallelPlan(4, **sizes, speeds=speeds)
            assert tiny.relative_error(scripted.forward(model, *given), expected) <= 2e-6, (speeds, sizes)
            held.add(scripted.models.held(model, range(4)))
            pids.add(scripted.worker_pids)
    assert len(held) == len(pids) == 1
    for sizes in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}):
        scripted._preparation.planner.plan = ParallelPlan(4, **sizes, speeds=(8, 1, 3, 2))
        assert tiny.relative_error(scripted.forward(model, *given), expected) <= 2e-6, sizes


def test_weights_in_shares_and_in_host_memory_do_not_mind_speeds(scripted, model, whole):
    given = tiny.inputs(FIVE_LAYERS, batch=2)
    scripted._preparation.planner.plan = ParallelPlan(4, speeds=(8, 1, 3, 2))
    for shard, offload in (("on", "off"), ("on", "on"), ("off", "on")):
        spec = replace(model, shard_weights=shard, offload=offload)
        assert tiny.relative_error(scripted.forward(spec, *given), whole(*given)) <= 2e-6, (shard, offload)
        scripted.unload(spec)


def test_shares_and_loras_outlive_a_change_that_moves_no_weights(scripted, model):
    given = tiny.inputs(FIVE_LAYERS, batch=2)
    low_rank = LowRank(torch.full((512, 4), 0.1), torch.full((4, 512), 0.1), 0.5)
    patches = LoraSet("some", lambda: {"blocks.3.self_attn.v.weight": [low_rank]})
    for shard in ("on", "off"):
        spec, results, held = replace(model, shard_weights=shard, offload="off"), [], set()
        for sizes in ({}, {"data_parallel": 2}, {"data_parallel": 4}, {}):
            scripted._preparation.planner.plan = ParallelPlan(4, **sizes)
            results.append(scripted.forward(spec, *given, loras=patches))
            held.add(scripted.models.held(spec, range(4)))
        assert torch.equal(results[0], results[-1])
        assert all(tiny.relative_error(out, results[0]) <= 2e-6 for out in results)
        assert len(held) == 1
        scripted.unload(spec)


def test_a_pool_that_died_comes_back_under_its_plan(scripted, model, whole):
    given = tiny.inputs(FIVE_LAYERS, batch=2)
    scripted._preparation.planner.plan = plan = ParallelPlan(4, data_parallel=2, tensor_parallel=2)
    scripted.forward(model, *given)
    killed = []

    def kill() -> None:
        if not killed:
            killed.append(os.kill(scripted.worker_pids[1], signal.SIGKILL))

    with pytest.raises(WorkerDied):
        scripted.forward(model, *tiny.inputs(FIVE_LAYERS, (4, 40, 40), batch=2), poll=kill)
    assert tiny.relative_error(scripted.forward(model, *given), whole(*given)) <= 2e-6
    assert scripted.settings.plan == plan


def test_what_was_asked_for_and_cannot_work_is_refused_before_anything_starts(model):
    pool = Pool(PoolSettings(ParallelPlan(8, tensor_parallel=8), device="cpu", auto=True))
    for attempt in (pool.check, pool.ensure_ready, lambda spec: pool.forward(spec, *tiny.inputs(FIVE_LAYERS))):
        with pytest.raises(PlanError, match=r"does not divide the 4 heads .* The nearest sizes that work are"):
            attempt(model)
    assert not pool.alive


def test_kinds_of_forwards_that_take_turns_keep_a_plan_each_if_no_weights_move(model):
    planner, halves = Planner(PoolSettings(ParallelPlan(4), auto=True)), ParallelPlan(4, data_parallel=2)
    two, three, divided = Workload(model, 36, 2), Workload(model, 36, 3), Workload(model, 99, 1)
    tensor = ParallelPlan(4, tensor_parallel=2)
    planner._chosen = {two: halves, three: ParallelPlan(4), divided: tensor}
    assert planner.recall(FIVE_LAYERS, two, ParallelPlan(4)) == halves and planner.recall(
        FIVE_LAYERS, three, halves
    ) == ParallelPlan(4)
    assert (
        planner.recall(FIVE_LAYERS, divided, tensor) == tensor and planner.recall(FIVE_LAYERS, divided, halves) is None
    )
    assert planner.recall(FIVE_LAYERS, Workload(model, 36, 4), halves) is None


def profiles(*kinds: tuple[str, float]) -> tuple[DeviceProfile, ...]:
    """Workers on devices of these names and rates of products."""
    return tuple(
        DeviceProfile(Machine(products=rate, link=1e10), 2**40, 2**40, 0, "PCIe", name) for name, rate in kinds
    )


def test_gpus_of_one_kind_are_alike_and_others_as_fast_as_they_are_measured():
    assert speeds_of(profiles(("H200", 7e14), ("H200", 6e14))) == ()
    assert speeds_of(profiles(("5090", 2.09e14), ("3090", 0.69e14))) == (100, 35)
    assert speeds_of(profiles(("3090", 0.71e14), ("5090", 2.1e14), ("3090", 0.69e14))) == (35, 100, 35)
    assert speeds_of(profiles(("A100 PCIe", 2.5e14), ("A100 SXM", 2.54e14))) == ()
    assert speeds_of(profiles(("H200", 7e14), ("ancient", 1e12))) == (100, 5)


@pytest.mark.parametrize("auto", [True, False])
def test_speeds_are_measured_once_and_are_the_plans_from_then_on(auto):
    planner = Planner(PoolSettings(ParallelPlan(2), auto=auto, by_speed=True))
    workload, workers = Workload(ModelSpec("random:14b"), 32760, 1), profiles(("fast", 2e14), ("slow", 1e14))
    assert planner.recall(FIVE_LAYERS, workload, ParallelPlan(2)) is None
    plan = planner.choose(PRESETS["14b"], workload, workers, ParallelPlan(2), False)
    assert plan == ParallelPlan(2, speeds=(100, 50)) == planner.recall(FIVE_LAYERS, workload, plan)
    assert planner.reason == "" or "at speeds 100:50" in planner.reason


@pytest.mark.parametrize("auto", [True, False])
def test_a_pool_of_unlike_devices_shares_after_their_speed(monkeypatch, model, whole, auto):
    pool = Pool(PoolSettings(ParallelPlan(2, ulysses_degree=2), device="cpu", auto=auto, by_speed=True))
    real, asked = pool._preparation.probe, []

    def probe(poll: object = None) -> tuple[DeviceProfile, ...]:
        asked.append(poll)
        return tuple(
            replace(worker, device=name, machine=replace(worker.machine, products=rate))
            for worker, (name, rate) in zip(real(poll), (("slow", 1e10), ("fast", 3e10)), strict=True)
        )

    monkeypatch.setattr(pool._preparation, "probe", probe)
    try:
        for _ in range(2):
            given = tiny.inputs(FIVE_LAYERS)
            assert tiny.relative_error(pool.forward(model, *given), whole(*given)) <= 2e-6
        assert pool.settings.plan == ParallelPlan(2, ulysses_degree=2, speeds=(35, 100)) and len(asked) == 1
    finally:
        pool.close()


def test_branches_of_cfg_are_not_split_between_unlike_gpus():
    """The slow one would take its branch alone; together they are as fast as 1.5 of the fast one."""
    workload, slow = Workload(ModelSpec("random:14b"), 32760, 2), profiles(("slow", 1e14), ("slow", 1e14))
    unlike = Planner(PoolSettings(ParallelPlan(2), auto=True, by_speed=True))
    plan = unlike.choose(PRESETS["14b"], workload, profiles(("fast", 2e14), ("slow", 1e14)), ParallelPlan(2), False)
    assert plan == ParallelPlan(2, speeds=(100, 50))
    alike = Planner(PoolSettings(ParallelPlan(2), auto=True, by_speed=True))
    assert alike.choose(PRESETS["14b"], workload, slow, ParallelPlan(2), False) == ParallelPlan(2, data_parallel=2)


def test_unlike_shares_are_for_exact_attention_of_our_own():
    plan = ParallelPlan(2, speeds=(2, 1))
    for settings in (
        PoolSettings(plan, device="cpu", usp_backend="xfuser"),
        PoolSettings(replace(plan, pipeline_parallel=2), device="cpu", pipeline_mode="pipefusion"),
    ):
        with pytest.raises(PlanError, match="Set gpu_shares to even"):
            Pool(settings)


def test_xfuser_and_pipefusion_run_as_set():
    for settings in (
        PoolSettings(ParallelPlan(2), device="cpu", usp_backend="xfuser", auto=True),
        PoolSettings(ParallelPlan(2, pipeline_parallel=2), device="cpu", pipeline_mode="pipefusion", auto=True),
    ):
        assert not Pool(settings).settings.auto


def test_all_wait_for_the_slowest_worker_and_host_memory_is_shared():
    fast, slow = Machine(2e14, 2e12, 2e11, 1e-4, 2e10), Machine(1e14, 3e12, 1e11, 2e-4, 1e10)
    workers = (DeviceProfile(fast, 10, 100, 7, "NVLink"), DeviceProfile(slow, 20, 90, 3, "NVLink"))
    assert slowest(workers) == Machine(1e14, 2e12, 1e11, 2e-4, 1e10)
    assert room_of(workers).devices == (10, 20) and room_of(workers).host == 100
