"""A pool runs on whichever executor it is given, and takes from it where its ranks live."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.comm import topology
from wan_parallel.distributed.executors.executor import Executor, RanksEnded
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.messages import Cancel, Message, PoolReady, decode, encode
from wan_parallel.distributed.protocol.pool_errors import Failure
from wan_parallel.distributed.protocol.replies import Done, Replies, Reply
from wan_parallel.distributed.protocol.requests import Request
from wan_parallel.distributed.protocol.specs import PoolSettings, RankLocation, on_one_host
from wan_parallel.distributed.shm.arena import Arena
from wan_parallel.distributed.shm.cancel import CancelBarrier, Cancelled, CancelMemory
from wan_parallel.distributed.worker import worker_report
from wan_parallel.distributed.worker.worker import Worker, device_at


class Inbox(Executor):
    """Ranks that live nowhere: what they are sent is answered at once by `reply`."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.messages: deque[Message] = deque()
        self.started = self.arenas = 0
        self.running = False

    @property
    def alive(self) -> bool:
        return self.running

    @property
    def pid(self) -> int:
        return self.started

    def resolve(self, settings: PoolSettings) -> PoolSettings:
        return settings

    def locations(self, settings: PoolSettings) -> tuple[RankLocation, ...]:
        return tuple(RankLocation(f"host {rank // 4}", rank % 4) for rank in range(settings.plan.num_gpus))

    def start(self, settings: PoolSettings) -> None:
        self.started += 1
        self.running = True
        self.ranks = range(settings.plan.num_gpus)
        self.messages.append(PoolReady(tuple(self.hello(rank) for rank in self.ranks)))

    def hello(self, rank: int):
        worker = SimpleNamespace(rank=rank, device=torch.device("cpu"))
        return worker_report.ready(worker)

    def send(self, message: Request | Cancel) -> None:
        self.sent.append(decode(encode(message)))
        if isinstance(message, Request):
            self.messages.append(Replies(message.id, tuple(self.reply(message, rank) for rank in self.ranks)))

    def reply(self, message: Request, rank: int) -> Reply:
        return Reply(message.id, rank, Done())

    def receive(self, seconds: float) -> Message | None:
        if not self.running:
            raise RanksEnded(Failure.of(WorkerDied("The host is gone.")))
        return self.messages.popleft() if self.messages else None

    def stop(self) -> None:
        self.running = False
        self.messages.clear()

    def make_arena(self, nbytes: int, pinned: bool = False) -> Arena:
        self.arenas += 1
        return Arena(nbytes, pinned)


class InThisProcess(Inbox):
    """One rank, which is a worker in this process."""

    def start(self, settings: PoolSettings) -> None:
        self.barrier = CancelMemory(1)
        self.worker = Worker(0, settings, CancelBarrier(self.barrier.path), on_one_host(1))
        super().start(settings)

    def reply(self, message: Request, rank: int) -> Reply:
        return decode(encode(self.worker.handle(message)))


def test_a_forward_goes_through_the_executor_with_its_tensors_in_the_executors_memory(spec, model):
    executor, given = InThisProcess(), tiny.inputs(batch=2)
    pool = Pool(PoolSettings(ParallelPlan(1), device="cpu"), executor)
    for _ in range(2):
        assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6
    assert [type(message).__name__ for message in executor.sent] == ["Load", "Forward", "Forward"]
    assert (executor.started, executor.arenas, pool.launcher_pid) == (1, 1, 1)


def test_a_pool_may_have_more_ranks_than_one_machine_has_gpus():
    pool = Pool(PoolSettings(ParallelPlan(12), device="cpu"), Inbox())
    with pool.session():
        assert len(pool.worker_pids) == 12
    assert [at.host for at in pool.locations] == ["host 0"] * 4 + ["host 1"] * 4 + ["host 2"] * 4
    assert [at.device for at in pool.locations] == [0, 1, 2, 3] * 3


def test_ranks_that_ended_are_started_again(spec, model):
    executor, given = InThisProcess(), tiny.inputs()
    pool = Pool(PoolSettings(ParallelPlan(1), device="cpu"), executor)
    pool.forward(spec, *given)
    executor.running = False
    assert pool.status().state == "ended" and pool.models.held(spec, [0]) == (0, 0)
    assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6
    assert executor.started == 2


def test_ranks_that_end_in_a_request_fail_it(spec):
    class Ending(InThisProcess):
        def reply(self, message: Request, rank: int) -> Reply:
            self.running = False
            return super().reply(message, rank)

    pool = Pool(PoolSettings(ParallelPlan(1), device="cpu"), Ending())
    with pytest.raises(WorkerDied, match=r"The host is gone\. Queue the prompt again"):
        pool.forward(spec, *tiny.inputs())
    assert not pool.alive and pool.worker_pids == ()


def test_an_answer_to_something_else_is_refused(spec):
    pool = Pool(PoolSettings(ParallelPlan(1), device="cpu"), Inbox())
    with pool.session(), pytest.raises(ValueError, match="answered Report with something else than WorkerStatus"):
        pool.status()


def test_a_rank_takes_the_device_of_its_location():
    on_gpus = PoolSettings(ParallelPlan(2), device="cuda")
    assert device_at(on_gpus, RankLocation("another", 3)) == torch.device("cuda", 3)
    assert device_at(PoolSettings(ParallelPlan(2), device="cpu"), RankLocation("", 3)) == torch.device("cpu")


def test_the_link_is_to_the_gpus_of_the_same_host_wherever_their_ranks_are(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: asked.append((own, other)) or False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    locations = (RankLocation("a", 1), RankLocation("b", 0), RankLocation("a", 5), RankLocation("a", 0))
    worker = SimpleNamespace(rank=2, locations=locations, device=torch.device("cuda", 5))
    assert worker_report.link(worker) == "host memory" and asked == [(5, 1)]
    alone = SimpleNamespace(rank=1, locations=locations, device=torch.device("cuda", 0))
    assert worker_report.link(alone) == "no other GPU"
    assert topology.link_kind(torch.device("cpu"), [1, 2]) == "CPU"


def test_the_gate_has_a_leader_for_each_of_many_ranks():
    memory = CancelMemory(300)
    barriers = {rank: CancelBarrier(memory.path) for rank in (298, 299)}
    for request in (1, 2):
        for barrier in barriers.values():
            barrier.begin(request)
        if request == 2:
            memory.cancel(2)
            for rank, barrier in sorted(barriers.items(), reverse=True):
                with pytest.raises(Cancelled):
                    barrier.check(rank, 299)
        else:
            for rank, barrier in sorted(barriers.items(), reverse=True):
                barrier.check(rank, 299)
