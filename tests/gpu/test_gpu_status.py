"""Where the time of a forward and the memory went on real GPUs, and what it costs to measure it.

Run with `-s` to see the figures.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool, PoolStatus
from wan_parallel.distributed.comm import timing
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import Forward, Load
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.shm.arena import Arena, needed
from wan_parallel.distributed.shm.cancel import CancelBarrier, CancelMemory
from wan_parallel.distributed.worker import worker
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import grid_of

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

MODEL = ModelSpec("random:1.3b")
LARGE, SMALL = (21, 60, 104), (5, 30, 52)  # latent frames, rows, columns: 32760 and 1950 tokens
GIB = 2**30


@dataclass(frozen=True)
class Way:
    """A plan, and what its ranks exchange."""

    plan: ParallelPlan
    kinds: tuple[str, ...] = ()
    shard: str = "auto"
    offload: str = "auto"

    @property
    def gpus(self) -> int:
        return self.plan.num_gpus

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(MODEL.path, shard_weights=self.shard, offload=self.offload)

    def __str__(self) -> str:
        return f"{self.gpus}-{'-'.join(self.kinds) or 'alone'}"


WAYS = [
    Way(ParallelPlan(1)),
    Way(ParallelPlan(1), ("weights",), offload="on"),
    Way(ParallelPlan(2), ("all-to-all",)),
    Way(ParallelPlan(2), ("all-to-all", "weights"), shard="on"),
    Way(ParallelPlan(2, ring_degree=2), ("ring",)),
    Way(ParallelPlan(2, tensor_parallel=2), ("sums",)),
    Way(ParallelPlan(2, pipeline_parallel=2), ("pipeline",)),
    Way(ParallelPlan(4), ("all-to-all",)),
    Way(ParallelPlan(4, ulysses_degree=2, ring_degree=2), ("all-to-all", "ring")),
    Way(ParallelPlan(4, tensor_parallel=4), ("sums",)),
    Way(ParallelPlan(4, pipeline_parallel=2, tensor_parallel=2), ("pipeline", "sums")),
]


@pytest.fixture
def shared(request) -> Iterator[tuple[Way, PoolStatus]]:
    """A way to share GPUs, and the status after the second forward of two branches."""
    pool = Pool(PoolSettings(request.param.plan, device="cuda"))
    try:
        for _ in range(2):
            pool.forward(request.param.spec, *inputs(LARGE, 2))
        yield request.param, pool.status()
    finally:
        pool.close()


@pytest.fixture(scope="module")
def alone() -> float:
    """Seconds that one GPU computes for."""
    pool = Pool(PoolSettings(ParallelPlan(1), device="cuda"))
    try:
        for _ in range(2):
            pool.forward(MODEL, *inputs(LARGE, 2))
        return pool.status().times[0].compute
    finally:
        pool.close()


def inputs(latent: tuple[int, int, int], batch: int = 1) -> tiny.Inputs:
    return tiny.inputs(PRESETS["1.3b"], latent, batch, text_tokens=512)


def show(way: object, status: PoolStatus) -> None:
    print(f"\n{way}: {status.last_forward_seconds:.4f} s")
    for rank, times in enumerate(status.times):
        kinds = ", ".join(f"{kind} {seconds:.4f}" for kind, seconds in times.exchanges)
        print(
            f"  rank {rank}: compute {times.compute:.4f}, exchange {times.exchange:.4f} ({kinds}), "
            f"waiting {times.waiting:.4f}"
        )


@pytest.mark.parametrize("shared", WAYS, indirect=True, ids=str)
def test_the_parts_of_a_forward_add_up_and_the_work_is_that_of_one_gpu(shared, alone):
    way, status = shared
    show(way, status)
    for times in status.times:
        assert times.total == pytest.approx(status.last_forward_seconds, rel=0.01)
        assert {kind for kind, seconds in times.exchanges if seconds > 0} >= set(way.kinds)
    work = sum(times.compute for times in status.times)
    print(f"  computed {work:.4f} s in all, one GPU {alone:.4f} s")
    assert 0.8 * alone <= work <= 1.6 * alone
    if way.gpus == 1 and not way.kinds:
        assert status.times[0].compute >= 0.99 * status.last_forward_seconds


@pytest.mark.parametrize("shared", [WAYS[0], WAYS[1], WAYS[2], WAYS[5], WAYS[6]], indirect=True, ids=str)
def test_the_parts_of_the_memory_are_what_the_gpu_has(shared):
    way, status = shared
    for one in status.workers:
        use = one.memory
        print(way, use)
        assert use.measured and use.total == one.total
        assert use.weights > 0.05 * GIB and use.activations > 0.1 * GIB and use.others > 0
        assert use.weights + use.activations + use.cache <= one.peak_allocated * 1.001
        used = use.weights + use.activations + use.cache + use.peer_memory + use.unused + use.others
        assert abs(used - one.used) <= 0.1 * one.used + GIB
        assert use.free > 0


@pytest.mark.parametrize("shared", [Way(ParallelPlan(2, data_parallel=2))], indirect=True, ids=str)
def test_a_gpu_with_less_to_do_waits(shared):
    """Two branches of one GPU each wait for nobody; of three, one GPU has two."""
    way, status = shared
    show(way, status)
    assert max(times.waiting for times in status.times) <= 0.2 * status.last_forward_seconds
    pool = Pool(PoolSettings(way.plan, device="cuda"))
    try:
        for _ in range(2):
            pool.forward(MODEL, *inputs(LARGE, 3))
        status = pool.status()
    finally:
        pool.close()
    show(way, status)
    busy, idle = status.times
    assert idle.waiting == pytest.approx(0.5 * status.last_forward_seconds, rel=0.2)
    assert busy.waiting <= 0.1 * status.last_forward_seconds


# What measuring costs.


@pytest.mark.parametrize("shared", [Way(ParallelPlan(1))], indirect=True, ids=str)
def test_a_pair_of_events_costs_microseconds(shared):
    device, pairs = torch.device("cuda"), 2000
    for measured in (False, True):  # the first makes torch ready
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        begin.record()
        with timing.measuring(device) as recorder:
            for _ in range(pairs):
                with timing.measure_wait("ring", (0, 1)):
                    pass
            end.record()
            host = time.perf_counter() - started
            recorder.waits()
        if measured:
            on_device = begin.elapsed_time(end) / 1000
            read = time.perf_counter() - started - host
            each = [f"{1e6 * seconds / pairs:.1f} us" for seconds in (host, on_device, read)]
            print("\na pair of events: {} on the host, {} on the device, {} to read it".format(*each))
            assert max(host, on_device) / pairs < 100e-6


OVERHEAD = [WAYS[2], WAYS[5], WAYS[6], WAYS[7], WAYS[9]]


@pytest.mark.parametrize("latent", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("shared_plan", OVERHEAD, ids=str)
def test_measuring_does_not_slow_a_forward_down(shared_plan, latent, tmp_path):
    if torch.cuda.device_count() < shared_plan.gpus:
        pytest.skip(f"needs {shared_plan.gpus} CUDA GPUs")
    given, barrier = inputs(latent, 2), CancelMemory(shared_plan.gpus)
    arena = Arena(needed(given) + given.x.numel() * 8 + 4096)
    refs = [arena.write(tensor) for tensor in given]
    out = arena.allocate(torch.float32, (2, grid_of(given.x).tokens, given.x.shape[1] * 4))
    request = Forward(1, shared_plan.spec, arena.ref, *refs, out)
    settings = PoolSettings(shared_plan.plan, device="cuda")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_compare, args=(rank, settings, request, barrier.path, str(tmp_path)), daemon=True)
        for rank in range(shared_plan.gpus)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(240)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(shared_plan.gpus)]
    with_it, without = (
        statistics.median(map(max, zip(*(one[key] for one in told), strict=True))) for key in ("with", "without")
    )
    print(
        f"\n{shared_plan}, {grid_of(given.x).tokens} tokens: {with_it:.4f} s with, {without:.4f} s without measuring "
        f"({100 * (with_it / without - 1):+.2f} %), {told[0]['spans']} pairs of events"
    )
    if latent == LARGE:
        assert with_it <= 1.03 * without + 2e-3


def _compare(rank: int, settings: PoolSettings, request: Forward, barrier: str, folder: str) -> None:
    """Run forwards with and without measuring in turn, and write the seconds of each."""
    locations = on_one_host(settings.plan.num_gpus)
    worker.join_world(rank, settings, locations, f"file://{folder}/store")
    runner = worker.Worker(rank, settings, CancelBarrier(barrier), locations)
    handled = [runner.handle(Load(1, request.spec)), runner.handle(request)]
    measuring, told = timing.measuring, {"with": [], "without": []}
    for _ in range(7):
        for key, context in (("with", measuring), ("without", _quiet)):
            timing.measuring = context
            dist.barrier()
            torch.cuda.synchronize()
            handled.append(runner.handle(replace(request, id=len(handled))))
            told[key].append(handled[-1].seconds)
    assert not any(reply.failure for reply in handled), [reply.failure for reply in handled]
    told["spans"] = sum(len(wait.seconds) for wait in handled[1].outcome.waits)
    Path(folder, f"{rank}.json").write_text(json.dumps(told))


@contextmanager
def _quiet(device: torch.device) -> Iterator[timing.WaitRecorder]:
    yield timing.WaitRecorder(device)
