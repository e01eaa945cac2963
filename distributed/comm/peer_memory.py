"""Memory of each rank into which the other ranks of its host write, with flags that say what has arrived.

This is what torch calls symmetric memory. peer_memory_cuda.py has the memory of GPUs. On the CPU the memory is shared
between processes, and the flags are words in the same memory that the receiver looks at.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from ..shm.pinned import Segment

CHANNELS = 32
"""How many flags each rank has for each other rank."""

Word = tuple[int, int]
"""The index of a flag, and the value of the flag."""

REMEDY = "Use fewer frames or a smaller size, or switch overlap_p2p_comm off."
_SHORTEST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3


@dataclass(frozen=True)
class Letter:
    """Some columns of the matrices of a tensor, sent by one rank into the memory of another. All sizes are bytes.

    Args:
        rank: the rank that receives the columns; where the columns are waited for, the rank that sends them.
        channel: the flag that tells the receiver of their arrival.
        shape: matrices, rows of each, and the bytes of a row.
        start: where in the sender's tensor the first row begins.
        strides: from a matrix of the tensor to the next, and from a row to the next.
        offset: where in the receiver's memory the first row is to begin.
        strides_there: from a matrix to the next in the receiver's memory, and from a row to the next.
        packed: where the rows lie one after the other if they go through host memory, which is as large as the
            receiver's memory. No other letter lies there.
    """

    rank: int
    channel: int
    shape: tuple[int, int, int]
    start: int
    strides: tuple[int, int]
    offset: int
    strides_there: tuple[int, int]
    packed: int


class Mailbox(ABC):
    """The memory of the ranks of `group`, as one of them sees it.

    `send` writes letters into the memory of receivers. The receiver's `wait` for a letter makes the letter available to
    the work that its device does next; the nth `wait` for a sender and channel waits for the nth letter. Receivers
    acknowledge nothing: a sender must know by other means that the letter which lay there before has been read.

    Attributes:
        members: the ranks of the group.
        processors: multiprocessors of each member's GPU; 0 without a GPU.
        hops: how often a letter is copied on its way to the receiver.
    """

    hops = 1

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.members = tuple(dist.get_process_group_ranks(group))
        self.place, self.ranks = dist.get_rank(group), len(self.members)
        self.processors = (0,) * self.ranks
        self.nbytes = 0
        self._layout: Hashable = None

    def reserve(self, nbytes: int) -> None:
        """Have at least `nbytes` on every rank. A collective call; every letter that was sent has been waited for.

        Raises:
            HostMemoryError: on every rank. The host has no room for letters that go through its memory.
        """
        if nbytes <= self.nbytes:
            return
        self.close()
        self._make(nbytes)
        self.nbytes, self._layout = nbytes, None
        self._sent = [[0] * CHANNELS for _ in range(self.ranks)]
        self._awaited = [[0] * CHANNELS for _ in range(self.ranks)]
        dist.barrier(self.group)  # all flags are 0

    def arrange(self, layout: Hashable, nbytes: int) -> None:
        """Have at least `nbytes` on every rank, as `reserve` does, for letters that lie as `layout` says.

        Where `layout` is not the one of the call before, all ranks are waited for: they may still read letters that
        lie as the layout before said.
        """
        self.reserve(nbytes)
        if layout != self._layout:
            self._layout = layout
            dist.barrier(self.group)  # all have read the letters of the layout before

    def close(self) -> None:
        """Give the memory back, on all ranks. Letters are counted anew afterwards, as after an aborted run."""
        if self.nbytes:
            self.nbytes = 0
            self._drop()

    def own(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A part of this rank's memory, from byte `offset` on, as a tensor of this shape and dtype."""
        return self._part(self.place, offset, shape, dtype)

    def send(self, letters: Sequence[Letter], tensor: torch.Tensor) -> None:
        """Write parts of a contiguous tensor into the memory of ranks, once the device has computed the tensor.

        The letters leave in this order. Keep the tensor until all receivers have their parts, or give it to `hold`.
        """
        self._write(letters, [self._count(letter) for letter in letters], tensor)

    def wait(self, letters: Sequence[Letter]) -> None:
        """Let the device go on once these letters, the next ones of their senders on their channels, have arrived.

        It is best to wait for letters in the order in which they arrive.
        """
        words = []
        for letter in letters:
            self._awaited[letter.rank][letter.channel] += 1
            words.append((letter.rank * CHANNELS + letter.channel, self._awaited[letter.rank][letter.channel]))
        if words:
            self._await(letters, words)

    def _count(self, letter: Letter) -> int:
        """Count a letter; returns how many letters have gone to its receiver on its channel by now."""
        self._sent[letter.rank][letter.channel] += 1
        return self._sent[letter.rank][letter.channel]

    def _flag(self, letter: Letter) -> int:
        """The index of the receiver's flag that tells of the arrival of a letter."""
        return self.place * CHANNELS + letter.channel

    @abstractmethod
    def hold(self, tensor: torch.Tensor) -> None:
        """Keep the memory of `tensor` from being used anew before the letters with parts of `tensor` have left."""

    @abstractmethod
    def _make(self, nbytes: int) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...

    @abstractmethod
    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    @abstractmethod
    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _await(self, letters: Sequence[Letter], words: Sequence[Word]) -> None:
        """Let the device go on once these letters are in this rank's memory: once the flag of each letter has its
        value.

        `words` has the index of each letter's flag, and the value.
        """


class HostMailbox(Mailbox):
    """Memory shared between processes on CPUs."""

    def hold(self, tensor: torch.Tensor) -> None:
        """Nothing to do: `send` has copied the tensor when it returns."""

    def _make(self, nbytes: int) -> None:
        self._segment = Segment(
            nbytes, self.place, self.ranks, self.device, self.group, "what the workers send each other", REMEDY
        )

    def _drop(self) -> None:
        self._segment.close()
        del self._segment

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        length = prod(shape) * dtype.itemsize
        return self._segment.data[rank][offset : offset + length].view(dtype).view(*shape)

    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None:
        source = tensor.view(-1).view(torch.uint8)
        for letter, value in zip(letters, values, strict=True):
            if all(letter.shape):
                there = strided(self._segment.data[letter.rank], letter.shape, letter.offset, letter.strides_there)
                there.copy_(strided(source, letter.shape, letter.start, letter.strides))
            self._segment.words[letter.rank][self._flag(letter)] = value

    def _await(self, letters: Sequence[Letter], words: Sequence[Word]) -> None:
        flags = self._segment.words[self.place]
        pause = _SHORTEST_PAUSE
        for flag, value in words:
            while flags[flag] < value:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)


def strided(data: torch.Tensor, shape: tuple[int, int, int], start: int, strides: tuple[int, int]) -> torch.Tensor:
    """Matrices of bytes, of this shape (matrices, rows, bytes of a row), among the bytes of `data`."""
    return data.as_strided(shape, (*strides, 1), data.storage_offset() + start)
