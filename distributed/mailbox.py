"""Memory of each rank into which the other ranks of its host write, with flags that say what has arrived.

A collective call is a kernel, and a kernel takes multiprocessors from the computation beside it. Here the copy engines
of a GPU write straight into the memory of another one, and the front ends of both GPUs raise and await the flags, so
that neither the multiprocessors nor the processes have anything to do with it.

On the CPU the memory is shared between processes, and the flags are words in it that the receiver looks at.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import prod

import torch
import torch.distributed as dist

from .host_exchange import Segment
from .stream_memory import StreamMemory, StreamMemoryError, Word

log = logging.getLogger(__name__)

CHANNELS = 32
"""Flags from each rank to each other one."""

_FLAG_BYTES = 4096
_SHORTEST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3


@dataclass(frozen=True)
class Letter:
    """Some columns of the matrices of a tensor, for the memory of another rank.

    Args:
        rank: who gets them.
        channel: whose flag tells of them.
        shape: matrices, rows, columns; counted, as all that follows but `offset`, in elements of the tensor.
        start: where in the tensor the first row begins.
        strides: from a matrix to the next, and from a row to the next.
        offset: the byte of the receiver's memory at which the first row is to begin.
        strides_there: from a matrix and from a row to the next there.
    """

    rank: int
    channel: int
    shape: tuple[int, int, int]
    start: int
    strides: tuple[int, int]
    offset: int
    strides_there: tuple[int, int]


class Mailbox(ABC):
    """The memory of the ranks of `group`, as one of them sees it.

    What `send` writes, the receiver's `wait` for that sender and channel makes available to the work that its device
    does next; the nth `wait` is for the nth letter. Nothing is acknowledged: whoever sends must know by other means
    that what lies there has been read.

    Attributes:
        members: the ranks of the group.
        processors: multiprocessors of the GPU of each of them; 0 without one.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.members = tuple(dist.get_process_group_ranks(group))
        self.place, self.ranks = dist.get_rank(group), len(self.members)
        self.processors = (0,) * self.ranks
        self.nbytes = 0
        self._layout: Hashable = None

    def arrange(self, layout: Hashable, nbytes: int) -> None:
        """Have at least `nbytes` on every rank, for use in another way than before if `layout` is another one.

        A collective call; whatever was sent has been waited for.
        """
        if nbytes > self.nbytes:
            self.close()
            self._make(nbytes)
            self.nbytes = nbytes
            self._sent = [[0] * CHANNELS for _ in range(self.ranks)]
            self._awaited = [[0] * CHANNELS for _ in range(self.ranks)]
        elif layout == self._layout:
            return
        self._layout = layout
        dist.barrier(self.group)  # all have read what lay there, and all flags of a new memory are down

    def close(self) -> None:
        """Give the memory back, on all ranks, or lose count after a run that was given up."""
        if self.nbytes:
            self.nbytes = 0
            self._drop()

    def own(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A part of this rank's memory, from byte `offset` on."""
        return self._part(self.place, offset, shape, dtype)

    def send(self, letters: Sequence[Letter], tensor: torch.Tensor) -> None:
        """Write parts of a contiguous tensor, as the device has computed it by then, into the memory of ranks.

        In this order. Keep the tensor until all have it, or give it to `hold`.
        """
        self._write(letters, [self._count(letter) for letter in letters], tensor)

    def wait(self, senders: Iterable[int], *channels: int) -> None:
        """Let the device go on once the next letter of each of `senders` on each of these channels is there."""
        words = []
        for rank, channel in product(senders, channels):
            self._awaited[rank][channel] += 1
            words.append((rank * CHANNELS + channel, self._awaited[rank][channel]))
        if words:
            self._await(words)

    def _count(self, letter: Letter) -> int:
        """Count it; the number of letters to its receiver on its channel by now."""
        self._sent[letter.rank][letter.channel] += 1
        return self._sent[letter.rank][letter.channel]

    def _flag(self, letter: Letter) -> int:
        """Which of the receiver's flags is raised for it."""
        return self.place * CHANNELS + letter.channel

    @abstractmethod
    def hold(self, tensor: torch.Tensor) -> None:
        """Should `tensor` be dropped, let nothing else have its memory before what was sent of it has left."""

    @abstractmethod
    def _make(self, nbytes: int) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...

    @abstractmethod
    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    @abstractmethod
    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _await(self, words: Sequence[Word]) -> None:
        """Wait until each of these own flags has its value."""


class HostMailbox(Mailbox):
    """Between processes on CPUs."""

    def hold(self, tensor: torch.Tensor) -> None:
        """Nothing to do: `send` has copied it when it returns."""

    def _make(self, nbytes: int) -> None:
        self._segment = Segment(nbytes, self.place, self.ranks, self.device, self.group)

    def _drop(self) -> None:
        self._segment.close()
        del self._segment

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        length = prod(shape) * dtype.itemsize
        return self._segment.data[rank][offset : offset + length].view(dtype).view(*shape)

    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None:
        for letter, value in zip(letters, values, strict=True):
            if all(letter.shape):
                rows = tensor.as_strided(letter.shape, (*letter.strides, 1), tensor.storage_offset() + letter.start)
                there = self._segment.data[letter.rank][letter.offset :]
                there = there[: len(there) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
                there.as_strided(letter.shape, (*letter.strides_there, 1), there.storage_offset()).copy_(rows)
            self._segment.words[letter.rank][self._flag(letter)] = value

    def _await(self, words: Sequence[Word]) -> None:
        flags = self._segment.words[self.place]
        pause = _SHORTEST_PAUSE
        for flag, value in words:
            while flags[flag] < value:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)


class PeerMailbox(Mailbox):
    """Between GPUs that reach each other's memory, by torch's symmetric memory.

    Raises:
        MailboxError: they do not reach it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        super().__init__(group, device)
        self.processors = tuple(torch.cuda.get_device_properties(rank).multi_processor_count for rank in self.members)
        self._stream, self._computed = torch.cuda.Stream(device), torch.cuda.Event()
        try:
            self._driver = StreamMemory()
            self.arrange(None, _FLAG_BYTES)
            self._try_out()
        except (ImportError, AttributeError, RuntimeError, StreamMemoryError) as error:
            raise MailboxError(str(error).splitlines()[0]) from error

    def _try_out(self) -> None:
        """Send every rank this one's number, and look at what has come."""
        mine = torch.full((1,), self.place, dtype=torch.int64, device=self.device)
        self.hold(mine)
        letters = [Letter(rank, 0, (1, 1, 1), 0, (1, 1), 8 * self.place, (1, 1)) for rank in range(self.ranks)]
        self.send(letters, mine)
        self.wait(range(self.ranks), 0)
        got = self.own(0, (self.ranks,), torch.int64).tolist()
        if got != list(range(self.ranks)):
            raise StreamMemoryError(f"what the ranks wrote did not arrive ({got})")

    def _make(self, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._memory = symmetric.empty(_FLAG_BYTES + nbytes, dtype=torch.uint8, device=self.device)
        self._memory[:_FLAG_BYTES].zero_()
        self._peers = symmetric.rendezvous(self._memory, self.group.group_name)
        self._addresses = list(self._peers.buffer_ptrs)
        torch.cuda.synchronize(self.device)

    def _drop(self) -> None:
        torch.cuda.synchronize(self.device)
        del self._peers, self._memory

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._peers.get_buffer(rank, tuple(shape), dtype, (_FLAG_BYTES + offset) // dtype.itemsize)

    def hold(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._stream)

    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None:
        self._computed.record(torch.cuda.current_stream(self.device.index))
        self._stream.wait_event(self._computed)
        stream, address, size = self._stream.cuda_stream, tensor.data_ptr(), tensor.itemsize
        for _, together in groupby(zip(letters, values, strict=True), key=lambda sent: sent[0].channel):
            words = []
            for letter, value in together:
                there, (matrices, rows, columns) = self._addresses[letter.rank], letter.shape
                source, to = address + letter.start * size, there + _FLAG_BYTES + letter.offset
                (step, pitch), (step_there, pitch_there) = letter.strides, letter.strides_there
                for matrix in range(matrices if rows and columns else 0):
                    self._driver.copy(
                        stream,
                        (to + matrix * step_there * size, pitch_there * size),
                        (source + matrix * step * size, pitch * size),
                        columns * size,
                        rows,
                    )
                words.append((there + 4 * self._flag(letter), value))
            self._driver.write(stream, words)

    def _await(self, words: Sequence[Word]) -> None:
        stream, own = torch.cuda.current_stream(self.device.index).cuda_stream, self._addresses[self.place]
        self._driver.wait(stream, [(own + 4 * flag, value) for flag, value in words])


def open_mailbox(group: dist.ProcessGroup, device: torch.device) -> Mailbox | None:
    """A mailbox for these ranks, or None where their GPUs do not reach each other. A collective call."""
    if device.type != "cuda":
        return HostMailbox(group, device)
    why = _no_peers(group, device)
    mailbox = None
    if not why:
        try:
            mailbox = PeerMailbox(group, device)
        except MailboxError as error:
            why = str(error)
    works = torch.tensor([mailbox is not None], device=device, dtype=torch.int32)
    dist.all_reduce(works, dist.ReduceOp.MIN, group=group)
    if works.item():
        return mailbox
    log.info("Ulysses' exchanges go through NCCL, not beside the computation (%s).", why or "another GPU cannot")
    return None


def _no_peers(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why this GPU does not reach those of the other ranks; empty if it does."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "NCCL_P2P_DISABLE is set"
    others = (rank for rank in dist.get_process_group_ranks(group) if rank != device.index)
    unreached = [rank for rank in others if not torch.cuda.can_device_access_peer(device, rank)]
    return f"GPU {device.index} has no access to the memory of GPU {unreached[0]}" if unreached else ""


class MailboxError(RuntimeError):
    """The GPUs of a group do not reach each other's memory. The text says why, without a full stop."""
