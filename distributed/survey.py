"""What a worker's machine does: a fraction of a second of measuring, for the expectations of cost.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from .cost import Machine

_SKEW_SECONDS = 3e-4
"""How long ranks wait for the slowest one at an exchange, beyond its latency: 4 H200s (see tests/test_cost.py)."""
_REPEATS = 3


def survey(device: torch.device, world_size: int) -> Machine:
    """Time a product, a copy, an exchange among all ranks and a copy from host memory (a collective call)."""
    on_gpu = device.type == "cuda"
    size = 4096 if on_gpu else 256
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    nbytes = 2**26 if on_gpu else 2**20
    data = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(data)
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=on_gpu)

    def timed(work: Callable[[], object]) -> float:
        return _seconds(work, device)

    product = timed(lambda: torch.mm(a, b))
    copy = timed(lambda: other.copy_(data))
    upload = timed(lambda: other.copy_(host, non_blocking=True))
    measured = {"products": 2 * size**3 / product, "memory": 2 * nbytes / copy, "host": nbytes / upload}
    if world_size > 1:
        few = data[: world_size * 64]
        latency = timed(lambda: dist.all_to_all_single(torch.empty_like(few), few))
        rest = data[: nbytes // world_size * world_size]
        exchange = timed(lambda: dist.all_to_all_single(other[: len(rest)], rest))
        sent = len(rest) * (world_size - 1) / world_size
        measured["link"] = sent / max(exchange - latency, 0.1 * exchange)
        measured["latency"] = latency + (_SKEW_SECONDS if on_gpu else 0.0)
    return Machine(**measured)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of `work`, after once for connecting, choosing kernels and waking up the clocks."""
    times = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
