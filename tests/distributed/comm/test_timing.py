"""Where the time of a forward went: computing, exchanging, waiting for others."""

from __future__ import annotations

import time

import pytest
import torch
from testkit import tiny, worker_group
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.comm import timing
from wan_parallel.distributed.comm.timing import RankTimes, rank_times
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.replies import Reply
from wan_parallel.distributed.protocol.reports import WaitTimes
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import WanConfig

CPU = torch.device("cpu")
DEEP = WanConfig(dim=512, ffn_dim=256, num_heads=4, num_layers=4, text_dim=32)
NAP = 0.15  # before each of four blocks: much more than all of the forward takes on a busy machine
SLOW = 1
PLANS = {
    "all-to-all": ParallelPlan(4, ulysses_degree=4),
    "ring": ParallelPlan(4, ring_degree=4),
    "sums": ParallelPlan(4, tensor_parallel=4),
    "pipeline": ParallelPlan(4, pipeline_parallel=4),
    "all-to-all and sums": ParallelPlan(4, tensor_parallel=2, ulysses_degree=2),
    "pipeline and ring": ParallelPlan(4, pipeline_parallel=2, ring_degree=2),
}


def wait(kind: str, ranks: tuple[int, ...], *seconds: float) -> WaitTimes:
    return WaitTimes.of(kind, ranks, seconds)


# What is made of the stretches of time.


def test_the_last_one_to_come_waits_for_the_transfer_alone():
    first, last = rank_times([2.0, 2.0], [[wait("ring", (0, 1), 0.5, 0.1)], [wait("ring", (0, 1), 0.1, 0.2)]])
    assert first == RankTimes(pytest.approx(1.4), pytest.approx(0.2), pytest.approx(0.4), (("ring", first.exchange),))
    assert (last.compute, last.exchange, last.waiting) == pytest.approx((1.7, 0.2, 0.1))


def test_a_rank_that_is_done_waits_for_the_slowest():
    early, late = rank_times([1.0, 3.0], [[], []])
    assert (early.compute, early.waiting) == (1.0, 2.0)
    assert (late.compute, late.waiting) == (3.0, 0.0)


def test_groups_are_compared_by_themselves():
    pairs = [(0, 1), (0, 1), (2, 3), (2, 3)]
    stood = [0.1, 0.4, 0.5, 0.9]
    times = rank_times([1.0] * 4, [[wait("sums", p, s)] for p, s in zip(pairs, stood, strict=True)])
    assert [t.exchange for t in times] == pytest.approx([0.1, 0.1, 0.5, 0.5])
    assert [t.waiting for t in times] == pytest.approx([0.0, 0.3, 0.0, 0.4])


def test_copies_that_need_nobody_are_exchange_and_holding_back_is_waiting():
    (times,) = rank_times([1.0], [[wait("weights", (), 0.2, 0.3), wait(timing.CANCEL_BARRIER, (), 0.1)]])
    assert (times.compute, times.exchange, times.waiting) == pytest.approx((0.4, 0.5, 0.1))
    assert times.exchanges == (("weights", pytest.approx(0.5)),)


def test_what_one_rank_lacks_is_compared_among_the_others():
    times = rank_times([1.0, 1.0], [[wait("ring", (0, 1), 0.1, 0.3)], [wait("ring", (0, 1), 0.2)]])
    assert [t.exchange for t in times] == pytest.approx([0.4, 0.1])


# Taking notes.


def test_a_stretch_inside_another_counts_once_and_computation_inside_does_not():
    with timing.measuring(CPU) as recorder:
        with timing.measure_wait("USP", (0, 1)):
            with timing.measure_wait("ring"):
                time.sleep(0.02)
            with timing.computing():
                time.sleep(0.5)
                with timing.measure_wait("sums"):
                    pass
            time.sleep(0.02)
        with timing.measure_wait("pipeline", (3,)):  # alone
            pass
        waits = {wait.kind: wait for wait in recorder.waits()}
    assert set(waits) == {"USP", "sums"}
    assert waits["USP"].ranks == (0, 1) and len(waits["USP"].seconds) == 2
    assert 0.04 <= sum(waits["USP"].seconds) < 0.5


def test_nothing_is_noted_outside_a_forward_nor_after_one_that_failed():
    with pytest.raises(ValueError), timing.measuring(CPU) as failed, timing.measure_wait("ring"):
        raise ValueError
    with timing.measure_wait("ring"):
        pass
    assert [len(wait.seconds) for wait in failed.waits()] == [1]


# Real workers.


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("stopwatch") / "deep.safetensors", DEEP)


def job(path: str, plan: ParallelPlan, slow: bool, **options) -> worker_group.Job:
    nap = worker_group.Slow(SLOW, NAP) if slow else worker_group.Slow()
    return worker_group.Job(plan, ModelSpec(path, "fp32", "fp32", **options), tiny.inputs(DEEP, (4, 8, 8)), slow=nap)


@pytest.fixture(scope="module")
def replies(tmp_path_factory, path) -> dict[str, list[Reply]]:
    """Of a forward with a slow rank in each plan. One before it connects the ranks."""
    jobs = {}
    for name, plan in PLANS.items():
        jobs |= {f"{name}, first": job(path, plan, False), name: job(path, plan, True)}
    sharded = ParallelPlan(4, ulysses_degree=4)
    jobs["weights"] = job(path, sharded, True, shard_weights="on")
    for kind in (FILL, STALE):
        part = Displaced(kind, "run", ("conditional",), PatchSplit("temporal"))
        plain = job(path, sharded, kind == STALE)
        jobs[kind] = worker_group.Job(plain.plan, plain.spec, plain.given, part, slow=plain.slow)
    outcome = worker_group.run(4, list(jobs.values()), tmp_path_factory.mktemp("gloo"))
    return dict(zip(jobs, outcome.replies, strict=True))


def times_of(replies: list[Reply]) -> tuple[RankTimes, ...]:
    return rank_times([reply.seconds for reply in replies], [reply.outcome.waits for reply in replies])


@pytest.mark.parametrize("name", [*PLANS, "weights", FILL, STALE])
def test_no_rank_stands_still_longer_than_its_forward_takes(replies, name):
    for reply in replies[name]:
        still = sum(sum(wait.seconds) for wait in reply.outcome.waits)
        assert 0 < still <= reply.seconds, reply.rank
        assert len({(wait.kind, wait.ranks) for wait in reply.outcome.waits}) == len(reply.outcome.waits)
    longest = max(reply.seconds for reply in replies[name])
    for times in times_of(replies[name]):
        assert times.total == pytest.approx(longest, abs=1e-4)
        assert min(times.compute, times.exchange, times.waiting) >= 0


@pytest.mark.parametrize("name", [*PLANS, "weights", FILL, STALE])
def test_ranks_that_exchange_stand_still_equally_often(replies, name):
    groups = {}
    for reply in replies[name]:
        for own in reply.outcome.waits:
            if own.kind != timing.CANCEL_BARRIER and own.ranks:
                assert reply.rank in own.ranks
                groups.setdefault((own.kind, own.ranks), []).append(len(own.seconds))
    for (_, ranks), counts in groups.items():
        assert len(counts) == len(ranks) and len(set(counts)) == 1


@pytest.mark.parametrize("name", [*PLANS, "weights", STALE])
def test_the_others_wait_for_a_rank_that_is_slow(replies, name):
    times = times_of(replies[name])
    stages = PLANS[name].pipeline_parallel if name in PLANS else 1
    slept = DEEP.num_layers // stages * NAP
    assert times[SLOW].compute >= slept
    others = [other.waiting for rank, other in enumerate(times) if rank != SLOW]
    assert sum(others) / len(others) >= 0.5 * slept  # all of it, unless the machine holds the others up too


@pytest.mark.parametrize("name", [*PLANS, "weights", STALE])
def test_the_kinds_of_exchange_are_told_apart(replies, name):
    wanted = {"patches"} if name == STALE else set(name.split(" and "))
    for times in times_of(replies[name]):
        assert wanted <= {kind for kind, _ in times.exchanges}
        assert sum(seconds for _, seconds in times.exchanges) == pytest.approx(times.exchange)


# The pool.


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def test_the_pool_tells_of_its_last_forward_until_one_fails(path):
    spec, given = ModelSpec(path, "fp32", "fp32"), tiny.inputs(DEEP, (4, 8, 8), 2)
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    try:
        pool.ensure_ready(spec)
        before = pool.status()
        assert before.times == () and not before.failed and before.last_forward_seconds == 0
        pool.forward(spec, *given)
        status = pool.status()
        assert len(status.times) == 2 and not status.failed
        for times, worker in zip(status.times, status.workers, strict=True):
            assert times.total == pytest.approx(status.last_forward_seconds, abs=1e-4)
            assert times.compute > 0 and times.exchange > 0
            assert worker.memory.measured
            assert worker.memory.weights == sum(model.device_bytes for model in worker.models)
            parts = worker.memory
            used = parts.weights + parts.activations + parts.cache + parts.peer_memory + parts.unused + parts.others
            assert used + parts.free == parts.total

        def cancel() -> None:
            raise Interrupted

        with pytest.raises(Interrupted):
            pool.forward(spec, *tiny.inputs(DEEP, (6, 60, 60)), poll=cancel)
        status = pool.status()
        assert status.times == () and status.last_forward_seconds == 0 and status.failed
        assert not any(worker.memory.measured for worker in status.workers)
        pool.forward(spec, *given)
        assert pool.status().times and not pool.status().failed
    finally:
        pool.close()
    assert pool.status().times == ()
