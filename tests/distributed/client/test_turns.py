"""Threads take turns with a pool: whoever waits can be called off, and nobody waits for a thread that waits for him."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from testkit import tiny
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.client.rpc import Turn
from wan_parallel.distributed.executors.local import LocalExecutor
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import PoolSettings

CANCEL_SECONDS = 1
ARGUMENTS = {
    "forward": lambda spec: (spec, *tiny.inputs()),
    "ensure_ready": lambda spec: (spec,),
    "offload_others": lambda spec: (spec,),
}


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def interrupt() -> None:
    raise Interrupted


class OnOneGpu(LocalExecutor):
    """CPU workers that their pool takes for GPU workers, so that it asks for room."""

    def resolve(self, settings: PoolSettings) -> PoolSettings:
        return settings

    def start(self, settings: PoolSettings) -> None:
        super().start(replace(settings, device="cpu"))


@pytest.fixture
def gpu_pools() -> Iterator[list[Pool]]:
    pools = [Pool(PoolSettings(ParallelPlan(1), device="cuda"), OnOneGpu()) for _ in range(2)]
    yield pools
    for pool in pools:
        pool.close()


def together(*work: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=each, daemon=True) for each in work]
    for thread in threads:
        thread.start()
    return threads


def test_two_pools_that_end_each_other_to_make_room_both_go_on(gpu_pools, spec, model):
    meeting, results = threading.Barrier(2), {}
    given = tiny.inputs()

    def use(number: int) -> None:
        pool, other = gpu_pools[number], gpu_pools[1 - number]

        def make_room(_nbytes: int) -> None:
            meeting.wait(60)  # both are about to load
            other.close()

        results[number] = pool.forward(spec, *given, make_room=make_room)

    threads = together(lambda: use(0), lambda: use(1))
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for number in (0, 1):
        assert tiny.relative_error(results[number], model(*given)) <= 2e-6


def test_room_is_made_once_for_each_load_and_without_the_turn(gpu_pools, spec, model):
    pool, asked, given = gpu_pools[0], [], tiny.inputs()

    def make_room(nbytes: int) -> None:
        (elsewhere,) = together(pool.status)  # takes the turn
        elsewhere.join(10)
        assert not elsewhere.is_alive()
        asked.append(nbytes)

    for _ in range(2):
        out = pool.forward(spec, *given, make_room=make_room)
        assert tiny.relative_error(out, model(*given)) <= 2e-6
    assert len(asked) == 1 and asked[0] > 10**6


def test_what_makes_room_may_give_up(gpu_pools, spec, model):
    pool, given = gpu_pools[0], tiny.inputs()
    with pytest.raises(Interrupted):
        pool.forward(spec, *given, make_room=lambda _nbytes: interrupt())
    assert tiny.relative_error(pool.forward(spec, *given), model(*given)) <= 2e-6


@pytest.mark.parametrize("name", [*ARGUMENTS, "status", "unload", "trim", "probe", "close"])
def test_cancel_reaches_whoever_waits_for_the_turn(own_pool, spec, name):
    own_pool.ensure_ready(spec)
    worker, took = own_pool.worker_pids[1], threading.Event()
    os.kill(worker, signal.SIGSTOP)
    try:
        (other,) = together(lambda: own_pool.forward(spec, *tiny.inputs(), poll=took.set))
        assert took.wait(10)
        started = time.monotonic()
        with pytest.raises(Interrupted):
            getattr(own_pool, name)(*ARGUMENTS.get(name, lambda _spec: ())(spec), poll=interrupt)
        assert time.monotonic() - started < CANCEL_SECONDS
    finally:
        os.kill(worker, signal.SIGCONT)
    other.join(30)
    assert not other.is_alive() and own_pool.worker_pids[1] == worker


def test_a_turn_can_be_taken_again_by_who_has_it_and_is_free_after_an_error():
    turn = Turn()
    with pytest.raises(ValueError), turn.taken(None), turn.taken(interrupt):
        raise ValueError
    (elsewhere,) = together(lambda: turn.taken(None).__enter__())
    elsewhere.join(5)
    assert not elsewhere.is_alive()


def test_the_pool_tells_threads_whether_it_lives_while_another_one_ends_it():
    class Ending(LocalExecutor):
        """Ended by another thread between any two looks at it."""

        @property
        def _launcher(self):
            return reads.pop(0)

        @_launcher.setter
        def _launcher(self, launcher):
            del launcher

    class Process:
        pid = 7

        def poll(self) -> None:
            return None

    class Launcher:
        process = Process()

    executor = Ending()
    for name, expected in (("alive", True), ("pid", 7)):
        reads = [Launcher(), None]
        assert getattr(executor, name) == expected
    reads = [None]
    assert not executor.alive
