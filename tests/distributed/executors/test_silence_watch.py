"""Who hangs, and who is slow or waits for another: judged by signs and by what /proc says of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from testkit import tiny
from wan_parallel.distributed.executors.silence_watch import Observed, ProcessState, SilenceWatch
from wan_parallel.distributed.protocol.silence import STILL, STOPPED, WORKING, SilenceLimits, SilentProcess
from wan_parallel.distributed.shm.signs import Activity, Mark, Sign

BLOCK = Sign(5, Activity.FORWARD, 3, 8, Mark.NONE)
WAITING = replace(BLOCK, marks=Mark.WAITING)
ASLEEP, RUNNING, STUCK, DISK = ("S", 0.0), ("R", 1.0), ("T", 0.0), ("D", 0.0)


class Ranks:
    """Played processes under a clock of their own: each has a sign, a state and the part of a processor it takes."""

    def __init__(self, **limits: float):
        self.now, self.signs, self.states = 0.0, {}, {}
        self.watch = SilenceWatch(SilenceLimits(**limits), lambda: self.now, self._state_of)

    def _state_of(self, rank: int) -> ProcessState:
        letter, load = self.states[rank]
        return ProcessState(letter, load * self.now, 0)

    def wait(self, seconds: float, *ranks: tuple[Sign, tuple[str, float]], together: bool = True) -> list:
        """What is said after so many seconds of `ranks`."""
        self.states = dict(enumerate(state for _, state in ranks))
        observed = [Observed(rank, f"rank {rank}", rank, sign) for rank, (sign, _) in enumerate(ranks)]
        said = self.watch.look(observed, together)
        for _ in range(int(seconds)):
            self.now += 1
            said = self.watch.look(observed, together)
        return [(process.pid, process.kind) for process in said]

    def left(self, *ranks: tuple[Sign, tuple[str, float]]) -> float:
        observed = [Observed(rank, f"rank {rank}", rank, sign) for rank, (sign, _) in enumerate(ranks)]
        return self.watch.look(observed)[0].left


def test_a_stopped_rank_is_to_blame_and_not_those_that_wait_for_it():
    for other in ((WAITING, ASLEEP), (BLOCK, ASLEEP), (WAITING, RUNNING)):
        ranks = Ranks()
        assert ranks.wait(9, other, (BLOCK, STUCK)) == []
        assert ranks.wait(2, other, (BLOCK, STUCK)) == [(1, STOPPED)]
        assert ranks.left(other, (BLOCK, STUCK)) == pytest.approx(40 - 11)
        assert ranks.wait(30, other, (BLOCK, STUCK)) == [(1, STOPPED)] and ranks.left(other, (BLOCK, STUCK)) <= 0


def test_a_rank_at_rest_is_to_blame_and_not_one_that_waits_for_it():
    ranks, state = Ranks(), ((WAITING, RUNNING), (BLOCK, ASLEEP))
    assert ranks.wait(9, *state) == []
    assert ranks.wait(3, *state) == [(1, STILL)]
    assert 100 < ranks.left(*state) < 120
    ranks.wait(110, *state)
    assert ranks.left(*state) <= 0


@pytest.mark.parametrize(
    "state", [RUNNING, DISK, ("S", 0.5)], ids=["computes", "reads or swaps", "its threads compute"]
)
def test_a_rank_at_work_in_a_long_block_is_no_hang(state):
    ranks, all_of_them = Ranks(), ((WAITING, ASLEEP), (BLOCK, state), (BLOCK, ASLEEP))
    assert ranks.wait(59, *all_of_them) == []
    assert ranks.wait(2, *all_of_them) == [(1, WORKING)]
    ranks.wait(600, *all_of_them)
    assert ranks.left(*all_of_them) > 1000
    assert ranks.wait(11, (WAITING, ASLEEP), (BLOCK, ASLEEP))[0] == (1, STILL)
    assert ranks.left((WAITING, ASLEEP), (BLOCK, ASLEEP)) > 100  # it has not been at rest for long


@pytest.mark.parametrize("mark", [Mark.FIRST, Mark.PAGE_LOCKING])
def test_what_a_rank_has_announced_may_take_long_even_where_another_process_compiles_for_it(mark):
    announced = replace(BLOCK, marks=mark)
    ranks, state = Ranks(), ((WAITING, ASLEEP), (announced, ASLEEP))
    assert ranks.wait(59, *state) == []
    assert ranks.wait(3, *state) == [(1, STILL)] and ranks.left(*state) > 500
    assert ranks.wait(11, (WAITING, ASLEEP), (announced, STUCK)) == [(1, STOPPED)]


def test_ranks_that_all_wait_for_each_other_hang_and_the_one_that_is_behind_is_named():
    behind = replace(WAITING, done=2)
    assert Ranks().wait(12, (WAITING, ASLEEP), (behind, ASLEEP), (WAITING, ASLEEP)) == [(1, STILL)]
    idle = replace(BLOCK, activity=Activity.IDLE, done=0)
    assert Ranks().wait(12, (BLOCK, ASLEEP), (idle, ASLEEP)) == [(1, STILL)]


def test_each_rank_is_to_blame_for_itself_where_none_waits_for_another():
    assert Ranks().wait(12, (BLOCK, RUNNING), (BLOCK, ASLEEP), together=False) == [(1, STILL)]


def test_a_sign_ends_the_silence():
    ranks = Ranks()
    for count in range(20):
        assert ranks.wait(8, (replace(BLOCK, count=count), ASLEEP)) == []


def test_nobody_is_silent_while_the_whole_host_stands_still():
    ranks = Ranks()
    ranks.wait(5, (BLOCK, ASLEEP))
    ranks.now += 3600
    assert ranks.wait(2, (BLOCK, ASLEEP)) == []


@pytest.fixture
def process():
    started = []

    def start(code: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-S", "-E", "-c", code]))
        return started[-1].pid

    yield start
    for each in started:
        each.kill()
        each.wait()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("while True: pass", WORKING),
        ("import threading, time\nthreading.Thread(target=exec, args=('while True: pass',)).start()", WORKING),
        ("import time; time.sleep(60)", STILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", STOPPED),
    ],
    ids=["computes", "its thread computes", "sleeps", "stopped"],
)
def test_what_a_real_process_does_is_seen(process, code, kind):
    pid, limits = process(code), SilenceLimits(1.2)
    time.sleep(0.3)  # until it is there
    watch, said, end = SilenceWatch(limits), (), time.monotonic() + 10
    while not said and time.monotonic() < end:
        time.sleep(limits.tick)
        said = watch.look([Observed(0, "Worker rank 0", pid, BLOCK)])
    assert [process.kind for process in said] == [kind]
    assert tiny.sentences(said[0].warning()) == 2


def test_a_process_that_has_ended_has_no_state(process):
    pid = process("")
    os.waitpid(pid, 0)
    assert ProcessState.of(pid) is None


@pytest.mark.parametrize("kind", [STOPPED, STILL, WORKING])
def test_what_is_said_counts_on(kind):
    told = SilentProcess("Worker rank 3", 77, str(BLOCK), kind, 12.0, 28.0)
    assert "rank 3 (pid 77)" in told.warning() and "12 s" in told.warning() and "28 s" in told.warning()
    assert "17 s" in told.warning(5) and "23 s" in told.warning(5)
    assert tiny.sentences(told.ended()) == 1
