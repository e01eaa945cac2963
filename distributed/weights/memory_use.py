"""What a worker's device memory is used for, at the fullest moment of its last forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..protocol.reports import MemoryUse
from ..shm.host import host_memory


@dataclass(frozen=True)
class Allocated:
    """Bytes that torch's allocator has given out, and taken for that: now, and at most since they were set back."""

    now: int
    reserved: int
    most: int
    most_reserved: int


def allocated_on(device: torch.device) -> Allocated:
    """What torch's functions for each of these numbers give, which sort 160 others for every one."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    if not stats:  # CUDA has not been used yet
        return Allocated(0, 0, 0, 0)
    given, taken = (stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
    return Allocated(given["current"], taken["current"], given["peak"], taken["peak"])


class MemoryMeter:
    """Reads torch's allocator around a forward. On a CPU there is none: weights, caches and the host are told."""

    def __init__(self, device: torch.device):
        self._device, self._cuda = device, device.type == "cuda"
        self._allocated = self._reserved = 0  # the most before the counters were set back
        self.last: MemoryUse | None = None

    @property
    def peak_allocated(self) -> int:
        """The most bytes that torch gave out since the worker started; 0 on a CPU."""
        return max(self._allocated, allocated_on(self._device).most) if self._cuda else 0

    @property
    def peak_reserved(self) -> int:
        """The most bytes that torch took for that."""
        return max(self._reserved, allocated_on(self._device).most_reserved) if self._cuda else 0

    def begin(self) -> None:
        """Before a forward, once its weights are in place."""
        if self._cuda:
            there = allocated_on(self._device)
            self._allocated = max(self._allocated, there.most)
            self._reserved = max(self._reserved, there.most_reserved)
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self, weights: int, cache: int, mailboxes: int) -> None:
        """After a forward, with the bytes on the device of what is not activations (see `MemoryUse`)."""
        self.last = self.use(weights, cache, mailboxes, measured=True)

    def use(self, weights: int, cache: int, mailboxes: int, measured: bool = False) -> MemoryUse:
        """As it is now; `measured`: at the fullest moment since `begin`."""
        if not self._cuda:
            available, total = host_memory()
            others = max(0, total - available - weights - cache - mailboxes)
            return MemoryUse(weights, 0, cache, mailboxes, 0, others, total, measured)
        free, total = torch.cuda.mem_get_info(self._device)
        there = allocated_on(self._device)
        others = max(0, total - free - there.reserved - mailboxes)  # torch's allocator has no part in these
        allocated, reserved = (there.most, there.most_reserved) if measured else (there.now, there.reserved)
        reserved = max(allocated, reserved)
        activations = max(0, allocated - weights - cache)
        return MemoryUse(weights, activations, cache, mailboxes, reserved - allocated, others, total, measured)
