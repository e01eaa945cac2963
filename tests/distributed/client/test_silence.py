"""A process that stops without ending is named, waited for, and ended with its pool; the next forward is right."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from testkit import tiny
from testkit.processes import descendants, wait_until_gone
from wan_parallel.distributed.client.failures import WorkerSilent
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.silence import VARIABLE
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import WanConfig

MANY_LAYERS = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=8, text_dim=64)
LIMIT = 6  # said after 0.5 s, ended after 2 s where a process is stopped
ENDED_SECONDS = 5


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setenv(VARIABLE, str(LIMIT))


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("silence") / "many-layers.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, MANY_LAYERS), "fp32", "fp32")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(LIMIT))
        pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def given() -> tiny.Inputs:
    """A forward of a second or less."""
    return tiny.inputs(MANY_LAYERS, (6, 40, 40))


@pytest.fixture(scope="module")
def expected(pool, many_layers, given) -> torch.Tensor:
    pool.forward(many_layers, *given)
    return pool.forward(many_layers, *given)


class Stop:
    """Stops a process when first polled, and notes what the pool then says of it.

    Args:
        pid: gives the process.
        seconds: after which it goes on; None lets it be.
    """

    def __init__(self, pool: Pool, pid: Callable[[], int], seconds: float | None = None):
        self._pool, self._pid, self._seconds = pool, pid, seconds
        self.pid, self.stopped_at = 0, 0.0
        self.texts: list[tuple[float, str]] = []

    def __call__(self) -> None:
        if not self.pid:
            self.pid, self.stopped_at = self._pid(), time.monotonic()
            os.kill(self.pid, signal.SIGSTOP)
            if self._seconds is not None:
                threading.Timer(self._seconds, os.kill, (self.pid, signal.SIGCONT)).start()
        elif text := self._pool.silence.text:
            self.texts.append((time.monotonic() - self.stopped_at, text))


def test_a_stopped_worker_is_named_and_ended_and_the_next_forward_is_equal(pool, many_layers, given, expected, caplog):
    family = {pool.launcher_pid, *descendants(pool.launcher_pid)}
    stop = Stop(pool, lambda: pool.worker_pids[1])
    with caplog.at_level(logging.WARNING), pytest.raises(WorkerSilent) as failure:
        pool.forward(many_layers, *given, poll=stop)
    assert time.monotonic() - stop.stopped_at < ENDED_SECONDS
    seconds, said = stop.texts[0]
    assert seconds < 2
    place = rf"Worker rank 1 \(pid {stop.pid}\) has shown no sign of life for \d+ s, since [\d:]{{8}}, in a forward"
    assert re.match(rf"{place} \(block \d of 8\).*: the process is stopped .*kill -CONT {stop.pid}", said)
    assert "Worker rank 1" in caplog.text and "rank 0" not in caplog.text
    assert re.match(rf"{place}.*the process is stopped.*, so the pool was ended\. Queue", str(failure.value))
    for text in (said, str(failure.value)):
        assert tiny.sentences(text) == 2
    assert not wait_until_gone(family, ENDED_SECONDS)
    assert torch.equal(pool.forward(many_layers, *given), expected)


def test_a_worker_that_comes_back_in_time_goes_on(pool, many_layers, given, expected, caplog):
    before, stop = pool.worker_pids, Stop(pool, lambda: pool.worker_pids[0], 1.2)
    with caplog.at_level(logging.INFO):
        assert torch.equal(pool.forward(many_layers, *given, poll=stop), expected)
    assert stop.texts and "Worker rank 0" in stop.texts[0][1]
    assert pool.silence.text == "" and pool.worker_pids == before


def test_a_stopped_launcher_is_named_and_ended(pool, many_layers, given, expected):
    workers, stop = pool.worker_pids, Stop(pool, lambda: pool.launcher_pid)
    with pytest.raises(WorkerSilent, match=r"The pool's launcher \(pid \d+\) has shown no sign of life"):
        pool.forward(many_layers, *given, poll=stop)
    assert "The pool's launcher" in stop.texts[0][1]
    assert not wait_until_gone({stop.pid, *workers}, ENDED_SECONDS)
    assert torch.equal(pool.forward(many_layers, *given), expected)
