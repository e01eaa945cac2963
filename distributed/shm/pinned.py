"""Host memory that the ranks of a group share; on GPUs it is page-locked, so that copy engines reach it."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ...wanvideo.base.user_error import UserError
from . import signs
from .host import host_room
from .signs import Mark

_HEADER = mmap.PAGESIZE
_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class HostMemoryError(UserError, RuntimeError):
    """The host has too little memory for the buffers, or does not let them be pinned."""


class PinnedSharedMemory:
    """Host memory of each rank of a group, mapped and pinned by all of them. Making one is a collective call.

    Args:
        nbytes: bytes of each rank, beside the words.
        group_rank: this rank's position in the group.
        ranks: how many ranks the group has.
        purpose: what the memory is for, in words.
        remedy: what to do where there is too little memory, a sentence.

    Attributes:
        words: the first bytes of each rank's memory as 64-bit numbers, by rank.
        data: the `nbytes` of each rank behind them, uint8, by rank.

    Raises:
        HostMemoryError: on every rank. The host has too little memory for all groups, or a driver does not pin it.
    """

    def __init__(
        self,
        nbytes: int,
        group_rank: int,
        ranks: int,
        device: torch.device,
        group: dist.ProcessGroup,
        purpose: str,
        remedy: str,
    ):
        self.nbytes, self.ranks, self.device = nbytes, ranks, device
        groups = dist.get_world_size() // ranks  # each group makes such a segment at the same time
        room, pinned_bytes = host_room(), ranks * (_HEADER + nbytes)
        needed = groups * pinned_bytes
        fd = os.memfd_create("wan-parallel") if needed <= room else -1
        names = _all_gathered((os.getpid(), fd, room), ranks, device, group)
        if any(fd < 0 for _, fd, _ in names):
            _close(fd)
            spare = max(0, min(room for *_, room in names))
            raise HostMemoryError(
                f"The host has {spare / 2**30:.1f} GiB of memory to spare, and {purpose} would take "
                f"{needed / 2**30:.1f} GiB. {remedy}"
            )
        os.ftruncate(fd, _HEADER + nbytes)
        own = mmap.mmap(fd, _HEADER + nbytes)
        torch.frombuffer(own, dtype=torch.uint8).zero_()  # each rank its own pages, side by side
        with signs.marked(Mark.WAITING):
            dist.barrier(group)  # all ranks' memory has its full length
        self._maps = [
            own if rank == group_rank else _open(pid, number, own) for rank, (pid, number, _) in enumerate(names)
        ]
        self.words = [memoryview(m)[:_HEADER].cast("q") for m in self._maps]
        self.data = [torch.frombuffer(m, dtype=torch.uint8, offset=_HEADER) for m in self._maps]
        pinned = self.data if device.type == "cuda" else []
        self._give_back = weakref.finalize(self, _give_back, fd, pinned)
        self._give_back.atexit = False
        with signs.marked(Mark.PAGE_LOCKING):
            codes = [int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, _MAPPED)) for x in pinned]
        code = max(row[0] for row in _all_gathered((max(codes, default=0),), ranks, device, group))
        if code:
            self.close()
            raise HostMemoryError(
                f"The driver does not pin {pinned_bytes / 2**30:.1f} GiB of host memory for {purpose} ({code}). "
                f"{remedy}"
            )

    def close(self) -> None:
        """Give the memory back. No copy from or to the memory may be under way."""
        self._give_back()


def _give_back(fd: int, pinned: Sequence[torch.Tensor]) -> None:
    for data in pinned:
        torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
    _close(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _all_gathered(
    numbers: Sequence[int], ranks: int, device: torch.device, group: dist.ProcessGroup
) -> list[tuple[int, ...]]:
    """Every rank's `numbers`, by rank; a collective call of the group."""
    mine = torch.tensor(numbers, device=device)
    every = [torch.empty_like(mine) for _ in range(ranks)]
    with signs.marked(Mark.WAITING):
        dist.all_gather(every, mine, group=group)
        return [tuple(row.tolist()) for row in every]


def _open(pid: int, fd: int, own: mmap.mmap) -> mmap.mmap:
    """Map another rank's memory, which is as long as `own`."""
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        return mmap.mmap(opened, len(own))
    finally:
        os.close(opened)
