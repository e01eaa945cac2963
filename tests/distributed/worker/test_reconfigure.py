"""After `Reconfigure` a worker runs as one that was started with that plan: nothing it keeps is of the plan before."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from testkit import gloo_group, tiny, worker_group
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced, Forward, Load, Reconfigure
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.shm.arena import Arena
from wan_parallel.distributed.shm.cancel import CancelBarrier, CancelMemory
from wan_parallel.distributed.worker.worker import Worker

CONFIG = replace(tiny.TINY, num_heads=4)
HALVES = ParallelPlan(4, data_parallel=2)
WHOLE = ParallelPlan(4)
TENSOR = ParallelPlan(4, tensor_parallel=2)
STAGES = ParallelPlan(4, pipeline_parallel=2)


@dataclass(frozen=True)
class Change:
    """A worker that is started with one plan and goes over to the other, and the strategy by which it then runs."""

    before: ParallelPlan
    after: ParallelPlan
    strategy: str
    batch: int = 2

    def __str__(self) -> str:
        return f"{self.strategy}, {self.before.describe(4)} to {self.after.describe(4)}"


CHANGES = [
    Change(HALVES, TENSOR, "displaced"),  # pairs of ranks share a video under both plans, but other pairs
    Change(TENSOR, HALVES, "displaced"),
    Change(HALVES, WHOLE, "displaced"),  # the models stay
    Change(WHOLE, HALVES, "displaced"),
    Change(WHOLE, STAGES, "pipefusion"),
    Change(STAGES, TENSOR, "displaced"),
]


def steps(change: Change, path: str) -> list[worker_group.Job]:
    """Two steps of one run, under both plans; that under the plan before is another run of the same items."""
    jobs = []
    for plan, kind in itertools.product((change.before, change.after), (FILL, STALE)):
        given = tiny.inputs(CONFIG, (4, 8, 8), batch=change.batch)
        given = given._replace(x=given.x * (1 + 0.1 * (kind == STALE)), timestep=given.timestep - 20 * (kind == STALE))
        branch_ids = tuple(map(str, range(change.batch)))
        strategy = change.strategy if plan == change.after else "displaced"
        part = Displaced(kind, "run", branch_ids, PatchSplit("temporal"), manager="native", strategy=strategy)
        jobs.append(worker_group.Job(plan, ModelSpec(path, "fp32", "fp32"), given, part))
    return jobs


def run_change(
    rank: int, world_size: int, barrier: str, work: list[tuple[Change, list[Forward], list[Forward]]]
) -> gloo_group.Results:
    """On each process: forwards of a worker that goes over, and of one that is started with the later plan."""
    for change, forwards, fresh in work:
        worker = Worker(rank, PoolSettings(change.before, "cpu"), CancelBarrier(barrier), on_one_host(world_size))
        spec, number = forwards[0].spec, forwards[0].id
        for request in (Load(number, spec), *forwards[:2], Reconfigure(number, change.after)):
            worker_group.handle(worker, request)
        for request in (Load(number, spec), *forwards[2:]):
            worker_group.handle(worker, request)
        assert worker.runner.models is worker.vaes.models is worker.models
        started = Worker(rank, PoolSettings(change.after, "cpu"), CancelBarrier(barrier), on_one_host(world_size))
        for request in (Load(number, spec), *fresh):
            worker_group.handle(started, request)
    return {"done": torch.ones(1)}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[list[torch.Tensor]]:
    """Of each change the two steps under the later plan after it, and the same of the worker started with that plan."""
    folder = tmp_path_factory.mktemp("reconfigure")
    path = tiny.write_checkpoint(folder / "tiny.safetensors", CONFIG)
    jobs = [steps(change, path) for change in CHANGES]
    arena, barrier = Arena(2 * sum(worker_group.room(job) for several in jobs for job in several)), CancelMemory(4)
    numbers = itertools.count(1)
    work = []
    for change, several in zip(CHANGES, jobs, strict=True):
        forwards = [worker_group.request(next(numbers), job, arena) for job in several]
        fresh = [worker_group.request(next(numbers), job, arena) for job in several[2:]]
        work.append((change, forwards, fresh))
    gloo_group.run(4, run_change, folder, barrier.path, work)
    return [
        [arena.view(forward.out).clone() for forward in (*forwards[2:], *fresh)] for _change, forwards, fresh in work
    ]


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=[str(change) for change in CHANGES])
def test_a_forward_after_a_change_of_plan_is_that_of_workers_started_with_it(outputs, number):
    fill, stale, started_fill, started_stale = outputs[number]
    assert torch.equal(fill, started_fill) and torch.equal(stale, started_stale)
