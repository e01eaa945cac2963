"""Pools whose workers hold parts of the model: results, cancel, deaths and refusals are those of any pool."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from testkit import tiny
from testkit.processes import wait_until_gone
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.parallel.pipeline import Flow, Stage
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.shm.cancel import CancelBarrier, Cancelled, CancelMemory
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.model.model import WanModel

DEEP = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=7, text_dim=64)
BUSY = (4, 40, 40)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("divided") / "deep.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, DEEP), "fp32", "fp32")


@pytest.fixture(scope="module")
def expected(deep) -> torch.Tensor:
    return WanModel.from_checkpoint(deep.path)(*tiny.inputs(DEEP, batch=3))


@pytest.fixture(scope="module")
def divided() -> Iterator[Pool]:
    """Two stages of two tensor-parallel workers, for the tests of this file to harm."""
    pool = Pool(PoolSettings(ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2), device="cpu"))
    yield pool
    pool.close()


def assert_right(pool: Pool, deep: ModelSpec, expected: torch.Tensor) -> None:
    assert tiny.relative_error(pool.forward(deep, *tiny.inputs(DEEP, batch=3)), expected) <= 2e-6


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def test_a_cancelled_forward_is_dropped_by_all_stages(divided, deep, expected):
    assert_right(divided, deep, expected)
    pids, work = divided.worker_pids, tiny.inputs(DEEP, BUSY, batch=2)
    divided.forward(deep, *work)
    seconds, cancelled = divided.status().last_forward_seconds, 0
    for share in (0.0, 0.3, 0.6, 0.9):  # in the first stage, with both at work, in the last
        started = time.monotonic()

        def poll(started: float = started, share: float = share) -> None:
            if time.monotonic() - started >= share * seconds:
                raise Interrupted

        try:
            divided.forward(deep, *work, poll=poll)
        except Interrupted:
            cancelled += 1
        assert_right(divided, deep, expected)
    assert cancelled  # others may use the machine, and a forward be done before its time
    assert divided.worker_pids == pids


def test_all_stages_leave_at_the_same_block(monkeypatch):
    stages, blocks, batches, rng = 3, 4, [slice(i, i + 1) for i in range(5)], random.Random(0)
    monkeypatch.setattr(Flow, "_exchange", lambda _flow: None)
    memory, places = CancelMemory(stages), set()
    barriers = [CancelBarrier(memory.path) for _ in range(stages)]

    def work(rank: int, request: int, left_at: list[tuple[int, int]]) -> None:
        pauses = random.Random(100 * request + rank)
        barriers[rank].begin(request)
        flow = Flow(
            Stage(rank, tuple(range(stages))),
            batches,
            blocks,
            lambda items: (0,),
            torch.device("cpu"),
            lambda leader, _block: barriers[rank].check(rank, leader),
        )
        try:
            for _ in flow:
                for block in range(blocks - rank % 2):  # stages of different lengths
                    flow.before_block(block)
                    time.sleep(pauses.random() * 4e-4)
        except Cancelled:
            left_at[rank] = (flow._slot, flow._checked)

    for request in range(1, 41):
        left_at = [(-1, -1)] * stages
        ranks = [threading.Thread(target=work, args=(rank, request, left_at)) for rank in range(stages)]
        for rank in ranks:
            rank.start()
        time.sleep(rng.random() * 1e-2)
        memory.cancel(request)
        for rank in ranks:
            rank.join(10)
            assert not rank.is_alive()
        assert len(set(left_at)) == 1, left_at
        places.add(left_at[0])
    assert len(places) > 3  # at the first, in the middle, never


@pytest.mark.parametrize("rank", [1, 2])
def test_a_worker_that_dies_in_a_sum_fails_the_forward_and_the_next_one_is_right(divided, deep, expected, rank):
    assert_right(divided, deep, expected)
    pids, killed = divided.worker_pids, []

    def kill() -> None:
        if not killed:
            killed.append(time.monotonic())
            os.kill(pids[rank], signal.SIGKILL)

    with pytest.raises(WorkerDied, match=f"rank {rank}"):
        divided.forward(deep, *tiny.inputs(DEEP, BUSY, batch=2), poll=kill)
    assert time.monotonic() - killed[0] < 5
    assert not wait_until_gone(pids, 5)
    assert_right(divided, deep, expected)


def test_the_status_tells_how_the_model_is_divided(divided, deep):
    divided.ensure_ready(deep)
    for worker in divided.status().workers:
        loaded = worker.models[0]
        assert (loaded.pipeline, loaded.tensor, loaded.ulysses, loaded.ring) == (2, 2, 1, 1)


@pytest.mark.parametrize(
    "sizes, reason",
    [({"tensor_parallel": 4}, "does not divide the 2 heads"), ({"pipeline_parallel": 8}, "this model has 7 blocks")],
    ids=str,
)
def test_a_model_that_cannot_be_divided_like_this_is_refused_before_anything_starts(deep, sizes, reason):
    pool = Pool(PoolSettings(ParallelPlan(8, **sizes), device="cpu"))
    for attempt in (pool.ensure_ready, lambda spec: pool.forward(spec, *tiny.inputs(DEEP))):
        with pytest.raises(PlanError, match=reason):
            attempt(deep)
    assert not pool.alive


@pytest.mark.parametrize("sizes", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=str)
def test_xfuser_is_refused_with_a_divided_model(sizes):
    with pytest.raises(PlanError, match="Set usp_backend to native") as refusal:
        Pool(PoolSettings(ParallelPlan(2, **sizes), device="cpu", usp_backend="xfuser"))
    assert tiny.sentences(str(refusal.value)) == 2
