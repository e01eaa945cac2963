"""A process that stops without ending is named, waited for, and ended with its pool; the next forward is right."""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from testkit import tiny
from testkit.processes import descendants, wait_until_gone
from wan_parallel.distributed.client.failures import PoolError, WorkerSilent
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.client.rpc import WorkersBusy
from wan_parallel.distributed.client.vae_client import VAEWeights, decode
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.protocol.silence import VARIABLE
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.shm.signs import Activity
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.example.vae_random import random_weights, vae_shapes

MANY_LAYERS = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=8, text_dim=64)
LIMIT = 6  # seconds; said after 0.5, ended after 2 where a process is stopped
SAID_SECONDS, ENDED_SECONDS, CANCEL_SECONDS = 2, 6, 1


class Interrupted(BaseException):
    """As ComfyUI's, no Exception."""


def interrupt() -> None:
    raise Interrupted


@pytest.fixture(scope="module", autouse=True)
def short_limit() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(LIMIT))
        yield


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory) -> ModelSpec:
    path = tmp_path_factory.mktemp("silence") / "many-layers.safetensors"
    return ModelSpec(tiny.write_checkpoint(path, MANY_LAYERS), "fp32", "fp32")


@pytest.fixture(scope="module")
def pool(short_limit) -> Iterator[Pool]:
    pool = Pool(PoolSettings(ParallelPlan(2), device="cpu"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def given() -> tiny.Inputs:
    """A forward of a second or less."""
    return tiny.inputs(MANY_LAYERS, (6, 40, 40))


@pytest.fixture(scope="module")
def expected(pool, many_layers, given) -> torch.Tensor:
    return pool.forward(many_layers, *given)


class Stop:
    """Stops a process when first polled, and notes what the pool then says of it.

    Args:
        pid: gives the process, or 0 while there is none.
        until_told: whether the process goes on as soon as something was said of it.
    """

    def __init__(self, pool: Pool, pid: Callable[[], int], until_told: bool = False):
        self._pool, self._pid, self._until_told = pool, pid, until_told
        self.pid, self.stopped_at, self.told_after, self.text = 0, 0.0, 0.0, ""

    def __call__(self) -> None:
        if not self.pid and (pid := self._pid()):
            self.stop(pid)
        elif not self.text and (text := self._pool.silence.text):
            self.text, self.told_after = text, time.monotonic() - self.stopped_at
            if self._until_told:
                os.kill(self.pid, signal.SIGCONT)

    def stop(self, pid: int) -> None:
        self.pid, self.stopped_at = pid, time.monotonic()
        os.kill(pid, signal.SIGSTOP)


def test_a_stopped_worker_is_named_and_ended_and_the_next_forward_is_equal(pool, many_layers, given, expected, caplog):
    family = {pool.launcher_pid, *descendants(pool.launcher_pid)}
    stop = Stop(pool, lambda: pool.worker_pids[1])
    waiting = threading.Thread(target=pool.status, daemon=True)
    waiting.start()
    with caplog.at_level(logging.WARNING), pytest.raises(WorkerSilent) as failure:
        pool.forward(many_layers, *given, poll=stop)
    assert time.monotonic() - stop.stopped_at < ENDED_SECONDS
    assert stop.told_after < SAID_SECONDS
    place = rf"Worker rank 1 \(pid {stop.pid}\) has shown no sign of life for \d+ s, since [\d:]{{8}}, in a forward"
    assert re.match(rf"{place} \(block \d of 8\).*: the process is stopped .*kill -CONT {stop.pid}", stop.text)
    assert "Worker rank 1" in caplog.text and "rank 0" not in caplog.text  # which waits for it
    assert re.match(rf"{place}.*the process is stopped.*, so the pool was ended\. Queue", str(failure.value))
    for text in (stop.text, str(failure.value)):
        assert tiny.sentences(text) == 2
    waiting.join(ENDED_SECONDS)
    assert not waiting.is_alive()
    assert not wait_until_gone(family, ENDED_SECONDS)
    assert torch.equal(pool.forward(many_layers, *given), expected)


def test_a_worker_that_comes_back_in_time_goes_on(pool, many_layers, given, expected):
    before, stop = pool.worker_pids, Stop(pool, lambda: pool.worker_pids[0], until_told=True)
    assert torch.equal(pool.forward(many_layers, *given, poll=stop), expected)
    assert "Worker rank 0" in stop.text
    assert pool.silence.text == "" and pool.worker_pids == before


def test_a_stopped_launcher_is_named_and_ended(pool, many_layers, given, expected):
    workers, stop = pool.worker_pids, Stop(pool, lambda: pool.launcher_pid)
    with pytest.raises(WorkerSilent, match=r"The pool's launcher \(pid \d+\) has shown no sign of life"):
        pool.forward(many_layers, *given, poll=stop)
    assert stop.told_after < SAID_SECONDS and "The pool's launcher" in stop.text
    assert not wait_until_gone({stop.pid, *workers}, ENDED_SECONDS)
    assert torch.equal(pool.forward(many_layers, *given), expected)


def test_a_worker_that_stops_while_it_starts_is_named_and_ended(pool):
    pool.close()

    def worker() -> int:
        children = descendants(pool.launcher_pid)
        return max((pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()), default=0)

    stop = Stop(pool, worker)
    with pytest.raises(WorkerSilent, match=r"\(pid \d+\) has shown no sign of life for .*, (starting|joining)"):
        pool.probe(stop)
    assert stop.text and time.monotonic() - stop.stopped_at < ENDED_SECONDS


def test_a_worker_that_stops_while_it_loads_is_named(pool, many_layers, given, expected):
    assert torch.equal(pool.forward(many_layers, *given), expected)
    signs = pool._executor._launcher._signs
    stop, loading = Stop(pool, lambda: 0, until_told=True), False

    def stop_while_it_loads() -> None:
        while signs.read(1).activity is not Activity.LOADING:
            time.sleep(1e-4)
        stop.stop(pool.worker_pids[1])

    while not loading:  # a load of some milliseconds, which may have passed
        pool.unload()
        stop.pid, stop.text = 0, ""
        watch = threading.Thread(target=stop_while_it_loads)
        watch.start()
        pool.ensure_ready(many_layers, stop)
        watch.join()
        os.kill(stop.pid, signal.SIGCONT)
        loading = "loading a model" in stop.text
    assert "Worker rank 1" in stop.text
    assert torch.equal(pool.forward(many_layers, *given), expected)


def test_a_worker_that_stops_while_it_decodes_is_named(pool):
    weights = random_weights("2.1", "decoder", 8)
    vae = VAEWeights("a", vae_shapes("2.1", "decoder", 8), lambda: weights)
    latent = torch.randn(1, 16, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    run = functools.partial(decode, pool, vae, latent, "fp32", VAEOptions(piece_mib=0))
    whole = run().frames
    stop = Stop(pool, lambda: pool.worker_pids[1], until_told=True)
    assert torch.equal(run(poll=stop).frames, whole)
    assert re.match(r"Worker rank 1 .*, decoding a video \(piece \d+\)", stop.text)


def test_what_waits_for_a_stopped_worker_can_be_called_off_and_has_an_end(pool, many_layers, given, expected):
    assert torch.equal(pool.forward(many_layers, *given), expected)
    os.kill(pool.worker_pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    for wait in (pool.unload, pool.status, pool.unload):
        started = time.monotonic()
        with pytest.raises(Interrupted):
            wait(poll=interrupt)
        assert time.monotonic() - started < CANCEL_SECONDS
    pool.trim()  # which has nothing to do while the workers do something
    with pytest.raises(WorkerSilent, match=r"Worker rank 1 .*(unloading|before it took the request up)"):
        pool.unload()
    assert pool.status().state == "not started"
    assert time.monotonic() - begin < ENDED_SECONDS
    assert torch.equal(pool.forward(many_layers, *given), expected)


def test_who_waits_for_the_turn_of_another_thread_gives_up(many_layers, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    pool, taken, done = Pool(PoolSettings(ParallelPlan(1), device="cpu")), threading.Event(), threading.Event()

    def hold() -> None:
        with pool._turn.taken(None):
            taken.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(10)
    for wait in (pool.unload, pool.trim, pool.status, pool.close, lambda: pool.offload_others(many_layers)):
        with pytest.raises(WorkersBusy) as busy:
            wait()
        assert tiny.sentences(str(busy.value)) == 2
    done.set()
    holder.join(10)
    assert pool.status().state == "not started"


@pytest.mark.parametrize("told", ["soon", "0", "nan", "1e9"])
def test_a_limit_that_is_none_is_refused(monkeypatch, told):
    monkeypatch.setenv(VARIABLE, told)
    with pytest.raises(PoolError, match=VARIABLE) as refusal:
        Pool(PoolSettings(ParallelPlan(1), device="cpu"))
    assert tiny.sentences(str(refusal.value)) == 2
