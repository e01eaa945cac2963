"""Runs a function on several processes that form a gloo group, as the workers of a pool do."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

Results = dict[str, torch.Tensor]
SECONDS = 120
PRELOADED = ["pytest", "testkit.worker_group"]
"""What the server that forks the processes has imported: torch, the pack and these helpers among it."""


def run(world_size: int, function: Callable[..., Results], folder: Path, *arguments: object) -> list[Results]:
    """Call `function(rank, world_size, *arguments)` on each process; their results by rank."""
    processes = [
        _context().Process(target=_main, args=(rank, world_size, function, folder, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS
    try:
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world_size)]


def _context() -> ForkServerContext:
    """Starts processes from one server, which all groups of a test run share."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    path = [str(Path(__file__).resolve().parents[1]), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # before Python 3.13 the server does not hear of sys.path
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _main(rank: int, world_size: int, function: Callable[..., Results], folder: Path, arguments: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size
    )
    with torch.inference_mode():
        results = function(rank, world_size, *arguments)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
