"""A worker's device memory: how blocks of weights are allocated there, and what the memory is used for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan.placement import SEGMENT
from ..protocol.reports import MemoryUse
from ..shm.host import host_memory


def release_cache(device: torch.device) -> None:
    """Give the memory that torch's allocator keeps for later back to the device.

    To be called before a long-lived allocation: it could else be cut from a segment that activations have left, and
    that would then have no room for activations.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rounding_unit(device: torch.device) -> int:
    """The unit, in bytes, to a multiple of which the allocation of a block is rounded up."""
    return 1 if device.type == "cpu" else SEGMENT


def segment_bytes(nbytes: int, device: torch.device) -> int:
    """Bytes of the device that `allocate_segment` takes for `nbytes`."""
    unit = rounding_unit(device)
    return -(-nbytes // unit) * unit


def allocate_segment(nbytes: int, device: torch.device) -> torch.Tensor:
    """Long-lived bytes on the device, uint8 [nbytes], in segments of torch's allocator that nothing else shares."""
    release_cache(device)
    return torch.empty(segment_bytes(nbytes, device), dtype=torch.uint8, device=device)[:nbytes]


@dataclass(frozen=True)
class Allocated:
    """Bytes that torch's allocator has given out to tensors, and has reserved of the device for them.

    `now` and `reserved` are the present figures, `most` and `most_reserved` the largest since the counters were reset.
    """

    now: int
    reserved: int
    most: int
    most_reserved: int


def allocated_on(device: torch.device) -> Allocated:
    """The figures of torch's allocator for one GPU, by one call.

    Torch's own function for a single figure sorts 160 figures each time.
    """
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    if not stats:  # CUDA has not been used yet
        return Allocated(0, 0, 0, 0)
    given, taken = (stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
    return Allocated(given["current"], taken["current"], given["peak"], taken["peak"])


class MemoryMeter:
    """Reads torch's allocator around a forward. On a CPU, which has no such allocator, activations count as 0."""

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
        """The most bytes that torch reserved of the device since the worker started; 0 on a CPU."""
        return max(self._reserved, allocated_on(self._device).most_reserved) if self._cuda else 0

    def begin(self) -> None:
        """Start the measurement of a forward, once its weights are in place."""
        if self._cuda:
            there = allocated_on(self._device)
            self._allocated = max(self._allocated, there.most)
            self._reserved = max(self._reserved, there.most_reserved)
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self, weights: int, cache: int, peer_memory: int) -> None:
        """Keep the memory use of the forward that has ended as `last`.

        Args:
            weights, cache, peer_memory: bytes on the device that are not activations (see `MemoryUse`).
        """
        self.last = self.use(weights, cache, peer_memory, measured=True)

    def use(self, weights: int, cache: int, peer_memory: int, measured: bool = False) -> MemoryUse:
        """The memory use now or, with `measured`, at the fullest moment since `begin`. Arguments as of `end`."""
        if not self._cuda:
            available, total = host_memory()
            others = max(0, total - available - weights - cache - peer_memory)
            return MemoryUse(weights, 0, cache, peer_memory, 0, others, total, measured)
        free, total = torch.cuda.mem_get_info(self._device)
        there = allocated_on(self._device)
        others = max(0, total - free - there.reserved - peer_memory)  # torch's allocator has no part in these
        allocated, reserved = (there.most, there.most_reserved) if measured else (there.now, there.reserved)
        reserved = max(allocated, reserved)
        activations = max(0, allocated - weights - cache)
        return MemoryUse(weights, activations, cache, peer_memory, reserved - allocated, others, total, measured)
