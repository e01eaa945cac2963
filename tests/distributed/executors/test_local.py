"""The executor of one machine: what of ComfyUI's environment reaches its ranks, where they live, how many there are."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from testkit import tiny
from wan_parallel.distributed.executors.executor import RanksEnded
from wan_parallel.distributed.executors.local import LocalExecutor, worker_environment
from wan_parallel.distributed.plan.degrees import ParallelPlan, PlanError
from wan_parallel.distributed.protocol.messages import PoolReady
from wan_parallel.distributed.protocol.requests import Report
from wan_parallel.distributed.protocol.specs import PoolSettings, RankLocation
from wan_parallel.distributed.shm.signs import SignsTable

ONE_WORKER = PoolSettings(ParallelPlan(1), device="cpu")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("backend:cudaMallocAsync", None),
        ("max_split_size_mb:512,backend:cudaMallocAsync", "max_split_size_mb:512"),
        ("expandable_segments:True", "expandable_segments:True"),
    ],
)
def test_comfyuis_choice_of_an_allocator_stays_its_own(name, given, passed_on):
    environment = worker_environment({"HOME": "/home/somebody", name: given})
    assert environment.get(name) == passed_on
    assert environment["HOME"] == "/home/somebody"


@pytest.mark.parametrize("num_gpus", [-1, 0, 9])
def test_a_number_of_gpus_that_no_machine_has_is_refused(num_gpus):
    with pytest.raises(PlanError, match=f"num_gpus is {num_gpus}. Choose 1 to 8.") as refusal:
        LocalExecutor().resolve(PoolSettings(ParallelPlan(num_gpus), device="cpu"))
    assert tiny.sentences(str(refusal.value)) == 2


def test_the_ranks_live_here_each_on_the_device_of_its_number():
    locations = LocalExecutor().locations(PoolSettings(ParallelPlan(3), device="cpu"))
    assert locations == tuple(RankLocation("", device) for device in range(3))
    assert all(at.is_here for at in locations) and not RankLocation("another", 0).is_here


def test_one_that_has_not_been_started_says_so_and_can_be_stopped():
    executor = LocalExecutor()
    assert not executor.alive and executor.pid == 0
    for use in (lambda: executor.send(Report(1)), lambda: executor.receive(0)):
        with pytest.raises(RanksEnded, match="has not been started"):
            use()
    executor.stop()


def test_a_request_after_the_death_of_a_worker_is_answered_with_who_died_of_what():
    executor = LocalExecutor()
    executor.start(ONE_WORKER)
    while not isinstance(ready := executor.receive(1), PoolReady):
        pass
    (worker,) = ready.workers
    os.kill(worker.pid, signal.SIGKILL)
    while executor.alive:
        time.sleep(0.01)
    executor.send(Report(1))
    with pytest.raises(RanksEnded, match=rf"Worker rank 0 \(pid {worker.pid}\) was ended by SIGKILL"):
        executor.receive(10)
    executor.stop()


def test_the_signs_can_be_opened_as_long_as_a_process_may_do_so(monkeypatch):
    executor, seen, close = LocalExecutor(), [], SignsTable.close
    executor.start(ONE_WORKER)
    launcher = Path(f"/proc/{executor.pid}")

    def close_and_note(table: SignsTable) -> None:
        seen.append(launcher.exists())
        close(table)

    monkeypatch.setattr(SignsTable, "close", close_and_note)
    executor.stop()
    assert seen == [False]
