"""What a process shows of its work is there for others at once, and says what the process is doing."""

from __future__ import annotations

import os
import subprocess
import sys
import typing

import pytest
import testkit
from testkit import tiny
from wan_parallel.distributed.comm import timing
from wan_parallel.distributed.executors.silence_watch import NO_SIGN
from wan_parallel.distributed.protocol.requests import AnyRequest
from wan_parallel.distributed.shm import signs
from wan_parallel.distributed.shm.signs import LAUNCHER, Activity, Mark, SignsTable
from wan_parallel.distributed.worker import worker

CHILD = """
import testkit
from wan_parallel.distributed.shm import signs
signs.show_in({path!r}, 2)
signs.begin(signs.Activity.FORWARD, 8)
signs.step()
signs.step()
signs.mark(signs.Mark.WAITING)
"""


@pytest.fixture
def table():
    """A table for three ranks, in which this process is rank 1."""
    table = SignsTable.create(3)
    signs.show_in(table.path, 1)
    yield table
    signs.show_in(SignsTable.create(1).path, 0)
    table.close()


def test_the_sign_of_another_process_is_seen(table):
    environment = {**os.environ, "PYTHONPATH": str(testkit.ROOT / "tests" / "support")}
    subprocess.run([sys.executable, "-c", CHILD.format(path=table.path)], check=True, env=environment)
    sign = table.read(2)
    assert str(sign) == "in a forward (block 2 of 8), waiting for other ranks"
    assert sign.is_waiting and not sign.is_announced
    assert [table.read(rank) for rank in (LAUNCHER, 0)] == [NO_SIGN] * 2


def test_each_sign_is_another_one(table):
    seen = {table.read(1).count}
    for show in (lambda: signs.begin(Activity.LOADING, 9), signs.step, lambda: signs.mark(Mark.FIRST)):
        show()
        seen.add(table.read(1).count)
    assert len(seen) == 4 and str(table.read(1)) == "loading a model (weight 1 of 9), for the first time in this size"


def test_marks_hold_for_a_part_and_the_outer_ones_come_back(table):
    with signs.marked(Mark.FIRST):
        with timing.measure_wait(timing.SUMS, [0, 1]):
            assert table.read(1).marks == Mark.FIRST | Mark.WAITING
        with pytest.raises(ValueError, match="out"), signs.marked(Mark.PAGE_LOCKING):
            raise ValueError("out")
        assert table.read(1).marks == Mark.FIRST
        with timing.measure_wait(timing.LATENTS):  # for which no other rank is needed
            assert not table.read(1).is_waiting
    assert table.read(1).marks == Mark.NONE


@pytest.mark.parametrize("activity", Activity)
def test_every_activity_has_words(table, activity):
    signs.begin(activity)
    assert str(table.read(1)) and tiny.sentences(f"It is {table.read(1)}.") == 1


def test_every_request_is_an_activity():
    assert set(worker._ACTIVITIES) == set(typing.get_args(AnyRequest))
