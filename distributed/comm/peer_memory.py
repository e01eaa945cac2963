"""Memory of each rank into which the other ranks of its host write, with signals that say what has arrived.

This is what torch calls symmetric memory. peer_memory_cuda.py has the memory of GPUs. On the CPU the memory is shared
between processes, and the signals are words in the same memory that the receiver looks at.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from ..shm import signs
from ..shm.pinned import PinnedSharedMemory
from ..shm.signs import Mark

SIGNALS = 32
"""How many signals each rank has for each other rank."""

SignalValue = tuple[int, int]
"""The index of a signal, and the value of the signal."""

REMEDY = "Use fewer frames or a smaller size, or switch overlap_p2p_comm off."
_SHORTEST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3


@dataclass(frozen=True)
class Transfer:
    """Some columns of the matrices of a tensor, sent by one rank into the memory of another. All sizes are bytes.

    Args:
        rank: the rank that receives the columns; where the columns are waited for, the rank that sends them.
        signal: the signal that tells the receiver of their arrival.
        shape: matrices, rows of each, and the bytes of a row.
        start: where in the sender's tensor the first row begins.
        strides: from a matrix of the tensor to the next, and from a row to the next.
        offset: where in the receiver's memory the first row is to begin.
        strides_there: from a matrix to the next in the receiver's memory, and from a row to the next.
        packed: where the rows lie one after the other if they go through host memory, which is as large as the
            receiver's memory. No other transfer lies there.
    """

    rank: int
    signal: int
    shape: tuple[int, int, int]
    start: int
    strides: tuple[int, int]
    offset: int
    strides_there: tuple[int, int]
    packed: int


class PeerMemory(ABC):
    """The memory of the ranks of `group`, as one of them sees it.

    `put` writes transfers into the memory of receivers. The receiver's `wait_signal` for a transfer makes the transfer
    available to the work that its device does next; the nth `wait_signal` for a sender and signal waits for the nth
    transfer. Receivers acknowledge nothing: a sender must know by other means that the transfer which lay there before
    has been read.

    Attributes:
        members: the ranks of the group.
        processors: multiprocessors of each member's GPU; 0 without a GPU.
        hops: how often a transfer is copied on its way to the receiver.
    """

    hops = 1

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.members = tuple(dist.get_process_group_ranks(group))
        self.group_rank, self.ranks = dist.get_rank(group), len(self.members)
        self.processors = (0,) * self.ranks
        self.nbytes = 0
        self._layout: Hashable = None

    def reserve(self, nbytes: int) -> None:
        """Have at least `nbytes` on every rank. A collective call; every transfer that was sent has been waited for.

        Raises:
            HostMemoryError: on every rank. The host has no room for transfers that go through its memory.
        """
        if nbytes <= self.nbytes:
            return
        self.close()
        self._make(nbytes)
        self.nbytes, self._layout = nbytes, None
        self._sent = [[0] * SIGNALS for _ in range(self.ranks)]
        self._awaited = [[0] * SIGNALS for _ in range(self.ranks)]
        with signs.marked(Mark.WAITING):
            dist.barrier(self.group)  # all signals are 0

    def arrange(self, layout: Hashable, nbytes: int) -> None:
        """Have at least `nbytes` on every rank, as `reserve` does, for transfers that lie as `layout` says.

        Where `layout` is not the one of the call before, all ranks are waited for: they may still read transfers that
        lie as the layout before said.
        """
        self.reserve(nbytes)
        if layout != self._layout:
            self._layout = layout
            with signs.marked(Mark.WAITING):
                dist.barrier(self.group)  # all have read the transfers of the layout before

    def close(self) -> None:
        """Give the memory back, on all ranks. Transfers are counted anew afterwards, as after an aborted run."""
        if self.nbytes:
            self.nbytes = 0
            self._drop()

    def own(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A part of this rank's memory, from byte `offset` on, as a tensor of this shape and dtype."""
        return self._part(self.group_rank, offset, shape, dtype)

    def put(self, transfers: Sequence[Transfer], tensor: torch.Tensor) -> None:
        """Write parts of a contiguous tensor into the memory of ranks, once the device has computed the tensor.

        The transfers leave in this order. Keep the tensor until all receivers have their parts, or give it to `hold`.
        """
        self._put(transfers, [self._count(transfer) for transfer in transfers], tensor)

    def wait_signal(self, transfers: Sequence[Transfer]) -> None:
        """Let the device go on once these transfers, the next ones of their senders on their signals, have arrived.

        It is best to wait for transfers in the order in which they arrive.
        """
        words = []
        for transfer in transfers:
            self._awaited[transfer.rank][transfer.signal] += 1
            words.append((transfer.rank * SIGNALS + transfer.signal, self._awaited[transfer.rank][transfer.signal]))
        if words:
            self._wait_signals(transfers, words)

    def _count(self, transfer: Transfer) -> int:
        """Count a transfer; returns how many transfers have gone to its receiver on its signal by now."""
        self._sent[transfer.rank][transfer.signal] += 1
        return self._sent[transfer.rank][transfer.signal]

    def _signal_index(self, transfer: Transfer) -> int:
        """The index of the receiver's signal that tells of the arrival of a transfer."""
        return self.group_rank * SIGNALS + transfer.signal

    @abstractmethod
    def hold(self, tensor: torch.Tensor) -> None:
        """Keep the memory of `tensor` from being used anew before the transfers with parts of `tensor` have left."""

    @abstractmethod
    def _make(self, nbytes: int) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...

    @abstractmethod
    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    @abstractmethod
    def _put(self, transfers: Sequence[Transfer], values: Sequence[int], tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _wait_signals(self, transfers: Sequence[Transfer], words: Sequence[SignalValue]) -> None:
        """Let the device go on once these transfers are in this rank's memory: once the signal of each transfer has its
        value.

        `words` has the index of each transfer's signal, and the value.
        """


class HostPeerMemory(PeerMemory):
    """Memory shared between processes on CPUs."""

    def hold(self, tensor: torch.Tensor) -> None:
        """Nothing to do: `put` has copied the tensor when it returns."""

    def _make(self, nbytes: int) -> None:
        self._segment = PinnedSharedMemory(
            nbytes, self.group_rank, self.ranks, self.device, self.group, "what the workers send each other", REMEDY
        )

    def _drop(self) -> None:
        self._segment.close()
        del self._segment

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        length = prod(shape) * dtype.itemsize
        return self._segment.data[rank][offset : offset + length].view(dtype).view(*shape)

    def _put(self, transfers: Sequence[Transfer], values: Sequence[int], tensor: torch.Tensor) -> None:
        source = tensor.view(-1).view(torch.uint8)
        for transfer, value in zip(transfers, values, strict=True):
            if all(transfer.shape):
                there = strided(
                    self._segment.data[transfer.rank], transfer.shape, transfer.offset, transfer.strides_there
                )
                there.copy_(strided(source, transfer.shape, transfer.start, transfer.strides))
            self._segment.words[transfer.rank][self._signal_index(transfer)] = value

    def _wait_signals(self, transfers: Sequence[Transfer], words: Sequence[SignalValue]) -> None:
        signals = self._segment.words[self.group_rank]
        pause = _SHORTEST_PAUSE
        for signal, value in words:
            while signals[signal] < value:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)


def strided(data: torch.Tensor, shape: tuple[int, int, int], start: int, strides: tuple[int, int]) -> torch.Tensor:
    """Matrices of bytes, of this shape (matrices, rows, bytes of a row), among the bytes of `data`."""
    return data.as_strided(shape, (*strides, 1), data.storage_offset() + start)
