"""Which blocks of a model leave the device for host memory, and which come back.

Nothing here is a collective call: each rank moves its own part of the blocks.
"""

from __future__ import annotations

import torch

from ..shm import signs
from .block_states import HostBlock, LooseBlock
from .block_store import BlockStore


class BlockOffloader:
    """Moves the blocks of one model between the device and host memory, in the order that spreads them evenly."""

    def __init__(self, store: BlockStore):
        self._store = store

    def offload(self, nbytes: float) -> int:
        """Move blocks to host memory until `nbytes` have left the device, or all; returns the bytes that left.

        A block that was in host memory before, and has not changed since, is not copied again: host memory has kept its
        bytes.
        """
        leaving = self._leaving(nbytes)
        for number in leaving:
            signs.step()
            self._store.offload(number)
        return self._bytes_of(leaving)

    def onload(self, count: int) -> None:
        """Bring blocks back from host memory until `count` are on the device."""
        present = set(self._store.on_device)
        absent = [number for number in reversed(self._store.to_host_order) if number not in present]
        entering = absent[: max(0, count - len(present))]
        for number in entering:
            signs.step()
            self._store.onload(number)
        if entering and self._store.device.type == "cuda":
            torch.cuda.synchronize(self._store.device)  # the copies in host memory may be dropped from now on

    def bytes_leaving(self, nbytes: float) -> int:
        """Bytes that would leave the device with `offload(nbytes)`."""
        return self._bytes_of(self._leaving(nbytes))

    def bytes_beyond(self, count: int) -> int:
        """Bytes that leave the device if `count` blocks stay there."""
        present = set(self._store.on_device)
        leaving = [number for number in self._store.to_host_order if number in present]
        return self._bytes_of(leaving[: max(0, len(present) - count)])

    def bytes_of_staying(self, count: int) -> int:
        """Bytes of the `count` blocks that stay on the device longest, wherever they are now."""
        order = self._store.to_host_order
        return self._bytes_of(order[max(0, len(order) - count) :])

    def host_bytes_for(self, nbytes: float) -> int:
        """Bytes of host memory that `offload(nbytes)` would allocate."""
        return self._bytes_of([number for number in self._leaving(nbytes) if not self._has_copy(number)])

    def _has_copy(self, number: int) -> bool:
        """Whether host memory has a block's bytes."""
        match self._store.states[number]:
            case LooseBlock():
                return False
            case HostBlock():
                return True
            case block:
                return block.copy is not None

    def _leaving(self, nbytes: float) -> list[int]:
        """Numbers of the blocks that `offload(nbytes)` would move, in their order."""
        leaving, present = [], set(self._store.on_device)
        for number in self._store.to_host_order:
            if nbytes <= 0:
                break
            if number in present:
                leaving.append(number)
                nbytes -= self._store.bytes_of(number)
        return leaving

    def _bytes_of(self, numbers: list[int]) -> int:
        return sum(self._store.bytes_of(number) for number in numbers)
