"""What the tests of cancels, deaths and silence do with the pool of a running ComfyUI."""

from __future__ import annotations

import itertools
import re

import torch
from testkit.comfyui.comfy_server import ComfyServer
from testkit.comfyui.graphs import conditions, ksampler, link, node, pool_model, stock_model, video
from testkit.comfyui.results import EXACT, Loader, sampled
from testkit.tiny import relative_error

# two layers over 10,192 tokens: a forward that takes seconds on a few cores
SLOW = {**pool_model(), **conditions(), **video(832, 448, 25)}
SAVED = {"out": node("SaveLatentTensor", samples=link("sampler"), name="unused")}
SEEDS = itertools.count(1000)  # ComfyUI's cache must not know the next one


def sampled_with(server: ComfyServer, seed: int, loader: Loader = pool_model) -> torch.Tensor:
    return sampled(server, {**loader(), **conditions(), **video(), **ksampler(seed=seed)})


def assert_right(server: ComfyServer) -> None:
    """The pool gives the native result."""
    seed = next(SEEDS)
    assert relative_error(sampled_with(server, seed), sampled_with(server, seed, stock_model)) <= EXACT


def pids(server: ComfyServer) -> tuple[int, list[int]]:
    """Launcher and workers of the pool, from the status node."""
    graph = {**pool_model(), "status": node("XDitUSPStatus", model=link("model"))}
    text = server.run(graph).outputs["status"]["text"][0]
    launcher = int(re.search(r"launcher pid (\d+)", text)[1])
    return launcher, [int(pid) for pid in re.findall(r"rank \d+:.* pid (\d+)", text)]
