"""How much memory the host of this process has, and how much of it may be taken for long."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ..plan.placement import PlacementError


def host_memory() -> tuple[int, int]:
    """Bytes of the host's memory that are available, and all of them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return available, total


def host_room() -> int:
    """Bytes of host memory that may be taken for long: the available bytes less a reserve for other processes."""
    available, total = host_memory()
    return available - total // 20


class HostShare:
    """What one of several ranks may take of the host's memory while all of them take some at the same time.

    A rank that looked at the free memory alone would count the bytes that other ranks are about to take. So each rank
    may take an equal part of the memory that is free when it first asks.

    Args:
        ranks: how many ranks of the host take memory at the same time.
    """

    def __init__(self, ranks: int):
        self._ranks, self._taken = ranks, 0

    @cached_property
    def _room(self) -> int:
        """Bytes of this rank's equal part, measured once: bytes that ranks take afterwards must not count a second
        time."""
        return host_room() // self._ranks

    def take(self, nbytes: int) -> None:
        """Count `nbytes` of weights that are about to be allocated in host memory; a negative number counts as none.

        Raises:
            PlacementError: this rank's part has no room for them.
        """
        if nbytes > 0:
            check_host_room(nbytes, self._room - self._taken)
            self._taken += nbytes


def check_host_room(needed: int, room: int) -> None:
    """Refuse to move `needed` bytes of weights to host memory that has `room` bytes for them.

    Raises:
        PlacementError: the room is too small.
    """
    if needed > room:
        raise PlacementError(
            f"Weights of {needed / 2**30:.1f} GiB must step out to host memory, which has {max(0, room) / 2**30:.1f} "
            "GiB for them. Close other programs, or unload models."
        )
