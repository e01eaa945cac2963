"""Cancel, unload, and deaths of every process, in a real ComfyUI."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import conditions, ksampler, link, node, pool_model, stock_model, video
from testkit.comfyui.pool_life import SAVED, SEEDS, SLOW, assert_right, pids, sampled_with
from testkit.processes import alive, descendants, wait_until_gone
from testkit.tiny import relative_error


@pytest.fixture
def running(server: ComfyServer) -> ComfyServer:
    """The server with the pool up and the model loaded."""
    sampled_with(server, next(SEEDS))
    return server


def queue_slow_prompt(server: ComfyServer) -> str:
    return server.queue({**SLOW, **SAVED, **ksampler(seed=next(SEEDS))})


def in_the_middle_of_a_forward(server: ComfyServer) -> str:
    """Queue a slow prompt and wait until its first forward is under way; the prompt's id."""
    prompt = queue_slow_prompt(server)
    time.sleep(1.0)
    assert server.get("/queue")["queue_running"]
    return prompt


def test_cancel_gives_comfyui_back_within_a_second(running, repetition):
    prompt = in_the_middle_of_a_forward(running)
    begin = time.monotonic()
    running.interrupt()
    outcome = running.wait(prompt)
    seconds = time.monotonic() - begin
    print(f"cancelled after {seconds:.2f} s")
    assert outcome.state == "interrupted" and outcome.node_type == "KSampler"
    assert seconds < 1.0
    assert_right(running)


def test_cancel_while_workers_start(running):
    launcher, workers = pids(running)
    os.kill(launcher, signal.SIGKILL)
    assert not wait_until_gone({launcher, *workers}, 5)
    prompt = queue_slow_prompt(running)
    time.sleep(0.5)
    begin = time.monotonic()
    running.interrupt()
    assert running.wait(prompt).state == "interrupted"
    assert time.monotonic() - begin < 1.0
    assert_right(running)


def test_unload_models_empties_the_workers(running):
    launcher, workers = pids(running)
    running.free()
    graph = {**pool_model(), "status": node("XDitUSPStatus", model=link("model"))}
    deadline = time.monotonic() + 20
    while "tiny.safetensors" in (text := running.run(graph).outputs["status"]["text"][0]):
        assert time.monotonic() < deadline, text
    assert f"launcher pid {launcher}" in text  # the processes stay
    assert_right(running)
    assert pids(running) == (launcher, workers)


def test_a_dead_worker_fails_the_prompt_and_the_next_one_is_right(running, repetition):
    launcher, workers = pids(running)
    prompt = in_the_middle_of_a_forward(running)
    begin = time.monotonic()
    os.kill(workers[1], signal.SIGKILL)
    outcome = running.wait(prompt)
    seconds = time.monotonic() - begin
    print(f"failed after {seconds:.2f} s: {outcome.message}")
    assert outcome.state == "error" and seconds < 5
    assert "rank 1" in outcome.message and "SIGKILL" in outcome.message
    assert not wait_until_gone({launcher, *workers}, 5)
    assert_right(running)


def test_a_worker_that_dies_between_prompts_is_replaced(running, repetition):
    launcher, workers = pids(running)
    os.kill(workers[0], signal.SIGKILL)
    assert not wait_until_gone({launcher, *workers}, 5)
    running.free()  # must not trip over the dead pool
    assert_right(running)


def test_a_dead_launcher_fails_the_prompt_and_the_next_one_is_right(running, repetition):
    launcher, workers = pids(running)
    prompt = in_the_middle_of_a_forward(running)
    begin = time.monotonic()
    os.kill(launcher, signal.SIGKILL)
    outcome = running.wait(prompt)
    seconds = time.monotonic() - begin
    print(f"failed after {seconds:.2f} s: {outcome.message}")
    assert outcome.state == "error" and "launcher" in outcome.message and seconds < 5
    assert not wait_until_gone(set(workers), 5)
    assert_right(running)


def test_a_replaced_file_is_another_model(running):
    models = running.base / "models" / "diffusion_models"
    changing, seed = models / "changing.safetensors", next(SEEDS)

    def graph(loader):
        return {**loader(file=changing.name), **conditions(), **video(), **ksampler(seed=seed)}

    shutil.copy(models / "tiny.safetensors", changing)
    before = running.sample(graph(pool_model), link("sampler"))
    shutil.copy(models / "tiny-low.safetensors", changing)
    after = running.sample(graph(pool_model), link("sampler"))
    expected = running.sample(
        {**stock_model(file="tiny-low.safetensors"), **conditions(), **video(), **ksampler(seed=seed)},
        link("sampler"),
    )
    assert relative_error(after, expected) <= 1e-5 < relative_error(before, expected)


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_nothing_outlives_a_killed_comfyui(start_comfyui, busy, repetition):
    server = start_comfyui()
    of_comfyui = set((server.base / "tmp").iterdir())
    sampled_with(server, next(SEEDS))
    launcher, workers = pids(server)
    family = descendants(server.pid)
    assert {launcher, *workers} <= family
    if busy:
        in_the_middle_of_a_forward(server)
    begin = time.monotonic()
    server.kill()
    left = wait_until_gone(family, 5)
    print(f"gone after {time.monotonic() - begin:.2f} s")
    assert not left
    assert set((server.base / "tmp").iterdir()) == of_comfyui  # its TMPDIR
    assert not [path for path in Path("/dev/shm").iterdir() if "wan" in path.name.lower()]


def test_ctrl_c_ends_everything(start_comfyui):
    server = start_comfyui()
    sampled_with(server, next(SEEDS))
    family = descendants(server.pid)
    server.stop()
    assert not wait_until_gone(family, 5)
    assert not alive(server.pid)
