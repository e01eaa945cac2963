"""The automatic plan on real GPUs: what is measured is plausible, and workers go from plan to plan exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.planner.planner import Planner, Workload
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.model.model import WanModel

GPUS = 4
if torch.cuda.device_count() < GPUS:
    pytest.skip(f"needs {GPUS} CUDA GPUs", allow_module_level=True)

FOUR_HEADS = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=4)


class Script(Planner):
    """Names the plan that a test says."""

    plan: ParallelPlan

    def recall(self, config: WanConfig, workload: Workload, current: ParallelPlan) -> ParallelPlan | None:
        return current if current == self.plan else None

    def choose(self, *_asked: object) -> ParallelPlan:
        return self.plan


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(PoolSettings(ParallelPlan(GPUS), device="cuda", auto=True))
    yield pool
    pool.close()


def test_what_the_workers_measure_is_what_such_gpus_do(pool):
    pool.probe()  # starts the workers
    started = time.perf_counter()
    again = pool.probe()
    assert time.perf_counter() - started < 0.5  # measured once
    for worker in again:
        machine = worker.machine
        assert 1e12 < machine.products < 1e16 and 1e10 < machine.memory < 1e14
        assert 1e8 < machine.link < 1e13 and 1e8 < machine.host < 1e12 and machine.latency < 0.05
        assert 0 < worker.room <= torch.cuda.get_device_properties(0).total_memory
        print(worker)


def test_workers_go_from_plan_to_plan_and_back(pool, tmp_path):
    path = tiny.write_checkpoint(tmp_path / "four-heads.safetensors", FOUR_HEADS)
    spec, given = ModelSpec(path, "fp32", "fp32"), [t.cuda() for t in tiny.inputs(FOUR_HEADS, (5, 16, 16), batch=2)]
    with torch.inference_mode():
        expected = WanModel.from_checkpoint(path, torch.float32, torch.float32, "cuda")(*given)
    chosen, pool._preparation.planner = pool._preparation.planner, Script(pool.settings)
    plans = ({}, {"data_parallel": 2}, {"tensor_parallel": 2}, {"pipeline_parallel": 2, "tensor_parallel": 2}, {})
    for sizes in (*plans, *plans):
        pool._preparation.planner.plan = ParallelPlan(GPUS, **sizes)
        started = time.perf_counter()
        got = pool.forward(spec, *given)
        print(f"{sizes}: first forward {time.perf_counter() - started:.2f} s")
        assert tiny.relative_error(got, expected) <= 1e-5
    pool._preparation.planner = chosen
    assert tiny.relative_error(pool.forward(spec, *given), expected) <= 1e-5
    print(pool.status().plan_reason)
