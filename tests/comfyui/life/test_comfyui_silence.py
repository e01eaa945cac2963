"""A worker that stops without ending, in a real ComfyUI: it is named, nothing waits for it for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import ksampler
from testkit.comfyui.pool_life import SAVED, SEEDS, SLOW, assert_right, pids, sampled_with
from testkit.comfyui.progress_texts import ProgressTexts
from testkit.processes import wait_until_gone
from wan_parallel.distributed.protocol.silence import VARIABLE, SilenceLimits

LIMITS = SilenceLimits(45)  # the default ones in less than half of the time


@pytest.fixture(scope="module")
def running(start_comfyui) -> Iterator[ComfyServer]:
    """A server with the pool up and the model loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(LIMITS.limit))
        server = start_comfyui()
    sampled_with(server, next(SEEDS))
    yield server
    server.stop()


@pytest.fixture
def texts(running) -> Iterator[ProgressTexts]:
    texts = ProgressTexts(running.port)
    yield texts
    texts.close()


def stop_in_the_middle_of_a_forward(server: ComfyServer, worker: int) -> str:
    """The id of the prompt."""
    prompt = server.queue({**SLOW, **SAVED, **ksampler(seed=next(SEEDS))})
    time.sleep(1.0)
    assert server.get("/queue")["queue_running"]
    os.kill(worker, signal.SIGSTOP)
    return prompt


def wait_for(seconds: float, happened: Callable[[], object]) -> float:
    """The seconds until something had happened, which must not take longer than `seconds`."""
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)
    return time.monotonic() - begin


def test_the_user_reads_who_is_silent_and_the_prompt_ends_by_the_limit(running, texts):
    launcher, workers = pids(running)
    prompt, begin = stop_in_the_middle_of_a_forward(running, workers[1]), time.monotonic()
    said = f"Worker rank 1 (pid {workers[1]}) has shown no sign of life for"
    wait_for(LIMITS.warn + 3, lambda: [text for node, text in texts.texts if node == "sampler" and said in text])
    assert said in running.log
    running.free()  # for after the prompt
    outcome = running.wait(prompt)
    seconds = time.monotonic() - begin
    print(f"failed after {seconds:.1f} s: {outcome.message}")
    assert outcome.state == "error" and said in outcome.message and "the pool was ended" in outcome.message
    assert seconds < LIMITS.end("stopped") + 5
    assert not wait_until_gone({launcher, *workers}, 5)
    assert_right(running)


def test_cancel_and_unload_work_while_a_worker_is_stopped_and_it_may_come_back(running, texts):
    before = pids(running)
    workers = before[1]
    prompt = stop_in_the_middle_of_a_forward(running, workers[0])
    begin = time.monotonic()
    running.interrupt()
    assert running.wait(prompt).state == "interrupted" and time.monotonic() - begin < 2
    running.free()
    wait_for(LIMITS.warn + 4, lambda: "Workers were asked to free memory, and ComfyUI goes on" in running.log)
    prompt = running.queue({**SLOW, **SAVED, **ksampler(seed=next(SEEDS))})
    wait_for(5, lambda: any(f"(pid {workers[0]})" in text for _, text in texts.texts))
    begin = time.monotonic()
    running.interrupt()
    assert running.wait(prompt).state == "interrupted" and time.monotonic() - begin < 2
    os.kill(workers[0], signal.SIGCONT)
    assert_right(running)
    assert pids(running) == before
