"""Cancel between two blocks, on all ranks of a group at the same block.

Ranks must leave a run of collectives together: one that stops earlier leaves the others waiting for ever. The
leader of those that share collectives (one data-parallel group) looks at the cancel flag before each block and
publishes its decision in shared memory; the others follow it. In a pipeline the leader changes from block to block.
"""

from __future__ import annotations

import mmap
import os
import time

_SPIN_SECONDS = 20e-6
_STEP_BITS, _ABORT = 24, 1  # a decision is request id | step | abort, one 64-bit word
_WORD = 8  # bytes


class Cancelled(Exception):
    """The client has given this request up."""


class CancelMemory:
    """The launcher's side: the cancel flag, and one decision word for each rank, as any may be a leader."""

    def __init__(self, world_size: int) -> None:
        self._fd = os.memfd_create("wan-parallel-cancel")
        nbytes = _WORD * (1 + world_size)
        os.ftruncate(self._fd, nbytes)
        self._words = memoryview(mmap.mmap(self._fd, nbytes)).cast("q")

    @property
    def path(self) -> str:
        """Where the ranks of this host open the memory."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def cancel(self, request: int) -> None:
        """Ask the leaders to stop `request`, and every earlier one."""
        self._words[0] = request


class CancelBarrier:
    """A rank's side. `leader` is the rank that decides on this block, the same for all that share collectives."""

    def __init__(self, path: str):
        fd = os.open(path, os.O_RDWR)
        try:
            self._words = memoryview(mmap.mmap(fd, 0)).cast("q")  # all of the file
        finally:
            os.close(fd)
        self._request, self._step = 0, 0

    def begin(self, request: int) -> None:
        """Start the blocks of a request; ids grow by time."""
        self._request, self._step = request, 0

    def check(self, rank: int, leader: int) -> None:
        """Pass on to the next block, or leave with the whole group.

        Raises:
            Cancelled: the leader saw the request cancelled.
        """
        self._step += 1
        if rank == leader:
            aborted = self._words[0] >= self._request
            self._words[1 + leader] = self._decision(self._step) | aborted
        else:
            aborted = self._follow(leader)
        if aborted:
            raise Cancelled

    def _decision(self, step: int) -> int:
        return (self._request << _STEP_BITS | step) << 1

    def _follow(self, leader: int) -> bool:
        wanted, first = self._decision(self._step), self._decision(0)
        while True:
            word = self._words[1 + leader]
            if word >= wanted:
                return bool(word & _ABORT) and word < wanted + 2
            if word >= first and word & _ABORT:
                return True
            time.sleep(_SPIN_SECONDS)
