"""Whoever sends to a process that reads nothing, or hears half of a message from it, does not wait for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import time

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from testkit.processes import wait_until_gone
from wan_parallel.distributed.executors.executor import RanksEnded
from wan_parallel.distributed.executors.local import LocalExecutor
from wan_parallel.distributed.executors.mailboxes import Inbox, Outbox
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import Report, Unload
from wan_parallel.distributed.protocol.silence import VARIABLE
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings

LARGE = bytes(2**21)  # more than a pipe holds


def test_messages_arrive_in_their_order_though_the_sender_has_not_waited():
    ours, theirs = multiprocessing.Pipe()
    outbox = Outbox(ours)
    begin = time.monotonic()
    for message in (LARGE, b"second", b"third"):
        outbox.send(message)
    assert not outbox.close(0.1) and time.monotonic() - begin < 1
    assert [theirs.recv_bytes() for _ in range(3)] == [LARGE, b"second", b"third"]
    assert outbox.close(10)


def test_a_sender_that_stops_in_the_middle_of_a_message_keeps_nobody_waiting():
    ours, theirs = multiprocessing.Pipe()
    inbox = Inbox(ours)
    os.write(theirs.fileno(), struct.pack("!i", 5) + b"mes")
    begin = time.monotonic()
    assert inbox.receive(0.05) is None and inbox.receive(0) is None
    assert time.monotonic() - begin < 1
    os.write(theirs.fileno(), b"ge")
    assert inbox.receive(10) == b"mesge"
    theirs.send_bytes(b"last")
    theirs.close()
    assert inbox.receive(10) == b"last"
    for _ in range(2):
        with pytest.raises(EOFError):
            inbox.receive(10)


def test_who_closes_a_line_can_wait_until_nothing_is_read_from_it():
    ours, theirs = multiprocessing.Pipe()
    inbox = Inbox(ours)
    assert not inbox.close(0.05)
    theirs.close()
    assert inbox.close(10)


def test_a_reader_that_has_ended_is_no_error_of_the_sender():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    outbox = Outbox(ours)
    outbox.send(LARGE)
    assert outbox.close(10)
    outbox.send(b"too late")


def test_a_launcher_that_reads_nothing_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setenv(VARIABLE, "3")
    executor = LocalExecutor()
    executor.start(PoolSettings(ParallelPlan(1), device="cpu"))
    launcher, begin = executor.pid, time.monotonic()
    os.kill(launcher, signal.SIGSTOP)
    executor.send(Unload(1, tuple(ModelSpec(f"{number:099}") for number in range(5000))))
    executor.send(Report(2))
    assert time.monotonic() - begin < 2
    with pytest.raises(RanksEnded, match=r"The pool's launcher .* is stopped"):
        while time.monotonic() - begin < 10:
            executor.receive(0.05)
    executor.stop()
    assert not wait_until_gone([launcher], 2) and time.monotonic() - begin < 8


def test_a_launcher_that_reads_nothing_is_ended_at_once():
    executor = LocalExecutor()
    executor.start(PoolSettings(ParallelPlan(1), device="cpu"))
    launcher = executor.pid
    os.kill(launcher, signal.SIGSTOP)
    executor.send(Unload(1, tuple(ModelSpec(f"{number:099}") for number in range(5000))))
    begin = time.monotonic()
    executor.stop()
    assert time.monotonic() - begin < 3 and not wait_until_gone([launcher], 2)
