"""Measures how fast a worker's machine is, in a fraction of a second, for the expectations of cost.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from ..protocol.machine import Machine
from ..shm import signs

_SKEW_SECONDS = 3e-4
"""How long ranks wait for the slowest one at an exchange, beyond its latency: 4 H200s (see
tests/distributed/planner/test_cost.py)."""
_REPEATS = 3
_PRODUCTS = 4  # in a row, so that a start of work weighs less


def probe(device: torch.device, world_size: int) -> Machine:
    """The rates of this rank's machine: times an exchange among all ranks, copies and products (a collective call)."""
    on_gpu = device.type == "cuda"
    products = _products(device)  # first, and its tensors freed before those of the copies are made: little may be free
    nbytes = 2**27 if on_gpu else 2**20
    data = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(data)
    host = torch.zeros(nbytes // 4, dtype=torch.uint8, pin_memory=on_gpu)

    def seconds(work: Callable[[], object]) -> float:
        return _seconds(work, device)

    measured = _exchange(data, other, world_size, seconds) if world_size > 1 else {}
    if on_gpu and world_size > 1:
        measured["latency"] += _SKEW_SECONDS
    copy = seconds(lambda: other.copy_(data))
    upload = seconds(lambda: other[: len(host)].copy_(host, non_blocking=True))
    return Machine(
        products=products,
        memory=2 * nbytes / copy,
        host=len(host) / upload,
        **measured,
    )


def _products(device: torch.device) -> float:
    """FLOP/s of matrix products on the device."""
    size, dtype = (256, torch.float32) if device.type == "cpu" else (4096, _fast_dtype())
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = _seconds(lambda: [torch.mm(a, a) for _ in range(_PRODUCTS)], device)
    return _PRODUCTS * 2 * size**3 / seconds


def _fast_dtype() -> torch.dtype:
    """The fast dtype of 16 bits: GPUs before Ampere only imitate bf16."""
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def _exchange(
    data: torch.Tensor, other: torch.Tensor, world_size: int, seconds: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Seconds of an exchange of next to nothing, and bytes/s that a rank sends in a large one."""
    few, many = world_size * 64, len(data) // world_size * world_size
    latency = seconds(lambda: dist.all_to_all_single(other[:few], data[:few]))
    all_of_it = seconds(lambda: dist.all_to_all_single(other[:many], data[:many]))
    sent = many * (world_size - 1) / world_size
    return {"latency": latency, "link": sent / max(all_of_it - latency, 0.1 * all_of_it)}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of `work`, which runs once before for connecting, choosing kernels and waking up the clocks."""
    times = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        signs.step()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
