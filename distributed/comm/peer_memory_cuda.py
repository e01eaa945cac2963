"""Mailboxes between GPUs, and which of two kinds of mailbox the ranks of a group can have.

A collective call is a kernel, and a kernel takes multiprocessors from the computation beside it. Here the copy engines
carry the letters, and the front ends of the GPUs write and await the flags, so that neither the multiprocessors nor the
processes have anything to do with an exchange.

Where GPUs reach each other's memory, the sender's GPU writes straight into the receiver's memory. Where they do not, as
most GeForce cards on PCIe, the sender's GPU writes into host memory that all ranks have page-locked, and the receiver's
own copy engine fetches the letter from there once the flag is there.

Streams may share a queue of the hardware, where a stream that waits holds up another one. No stream is held up for ever
as long as every rank launches the sending of its letters before it waits for the matching letters of the other ranks:
each wait is then for a letter that its sender launched earlier.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby
from math import prod

import torch
import torch.distributed as dist

from ..shm.pinned import HostMemoryError, Segment
from .peer_memory import REMEDY, HostMailbox, Letter, Mailbox, Word
from .stream_ops import StreamMemory, StreamMemoryError

log = logging.getLogger(__name__)

_FLAG_BYTES = 4096
_RAISED = 0x3F
"""The value of each byte of a flag that is above every value that is awaited."""
_TRY_SECONDS = 20.0
"""Seconds that the first letters, of 8 bytes, may take until a mailbox is given up."""


class GpuMailbox(Mailbox):
    """Memory of GPUs: streams carry the letters, and wait for them.

    Raises:
        MailboxError: this kind of mailbox does not work between these GPUs.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        super().__init__(group, device)
        self.processors = tuple(torch.cuda.get_device_properties(rank).multi_processor_count for rank in self.members)
        self._computed = torch.cuda.Event()
        # two streams: copies within a GPU are kernels, which wait until the computation leaves them room
        self._out, self._to_itself = torch.cuda.Stream(device), torch.cuda.Stream(device)
        try:
            self._driver = StreamMemory()
            self.arrange(None, _FLAG_BYTES)
            self._try_out()
        except (ImportError, AttributeError, RuntimeError, StreamMemoryError, HostMemoryError) as error:
            self.close()
            raise MailboxError(str(error).splitlines()[0]) from error

    def _try_out(self) -> None:
        """Send every rank this rank's number, and look at the numbers that have arrived."""
        mine = torch.full((1,), self.place, dtype=torch.int64, device=self.device)
        self.hold(mine)
        self.send([_number(rank, self.place) for rank in range(self.ranks)], mine)
        self.wait([_number(rank, rank) for rank in range(self.ranks)])
        arrived, deadline = torch.cuda.Event(), time.monotonic() + _TRY_SECONDS
        arrived.record(torch.cuda.current_stream(self.device.index))
        while not arrived.query():  # a driver may take these operations and not do them
            if time.monotonic() > deadline:
                self._raise_flags()
                raise StreamMemoryError(f"what the ranks wrote did not arrive within {_TRY_SECONDS:.0f} s")
            time.sleep(1e-3)
        got = self.own(0, (self.ranks,), torch.int64).tolist()
        if got != list(range(self.ranks)):
            raise StreamMemoryError(f"what the ranks wrote did not arrive ({got})")

    def hold(self, tensor: torch.Tensor) -> None:
        """See `Mailbox`: torch's allocator waits for both streams before it gives the memory out again."""
        tensor.record_stream(self._out)
        tensor.record_stream(self._to_itself)

    def _write(self, letters: Sequence[Letter], values: Sequence[int], tensor: torch.Tensor) -> None:
        self._computed.record(torch.cuda.current_stream(self.device.index))
        for stream in (self._out, self._to_itself):
            stream.wait_event(self._computed)
        address = tensor.data_ptr()

        def of_one_flag(sent: tuple[Letter, int]) -> tuple[bool, int]:
            return sent[0].rank == self.place, sent[0].channel

        for (to_itself, _), together in groupby(zip(letters, values, strict=True), key=of_one_flag):
            handle, words = (self._to_itself if to_itself else self._out).cuda_stream, []
            for letter, value in together:
                self._copy(handle, letter.shape, self._destination(letter), (address + letter.start, letter.strides))
                words.append((self._flags_of(letter.rank) + 4 * self._flag(letter), value))
            self._driver.write(handle, words)

    def _copy(
        self,
        stream: int,
        shape: tuple[int, int, int],
        to: tuple[int, tuple[int, int]],
        source: tuple[int, tuple[int, int]],
    ) -> None:
        """Copy matrices of bytes between two places, each an address and the strides of matrices and rows."""
        (matrices, rows, width), (there, strides_there), (here, strides) = shape, to, source
        for matrix in range(matrices if rows and width else 0):
            self._driver.copy(
                stream,
                (there + matrix * strides_there[0], strides_there[1]),
                (here + matrix * strides[0], strides[1]),
                width,
                rows,
            )

    @abstractmethod
    def _destination(self, letter: Letter) -> tuple[int, tuple[int, int]]:
        """Where this rank writes a letter: an address, and the strides from matrix to matrix and from row to row."""

    @abstractmethod
    def _flags_of(self, rank: int) -> int:
        """The address of a rank's flags, as this rank's GPU reaches them."""

    @abstractmethod
    def _raise_flags(self) -> None:
        """Let this rank's streams go on, whichever flags they wait for."""


def _number(rank: int, sender: int) -> Letter:
    """A letter of 8 bytes: the number of `sender`."""
    return Letter(rank, 0, (1, 1, 8), 0, (8, 8), 8 * sender, (8, 8), 8 * sender)


class PeerMailbox(GpuMailbox):
    """Memory of GPUs that reach each other's memory, by torch's symmetric memory."""

    def _make(self, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.empty_cache()  # symmetric memory takes nothing from torch's cache
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

    def _destination(self, letter: Letter) -> tuple[int, tuple[int, int]]:
        return self._addresses[letter.rank] + _FLAG_BYTES + letter.offset, letter.strides_there

    def _flags_of(self, rank: int) -> int:
        return self._addresses[rank]

    def _raise_flags(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            self._memory[:_FLAG_BYTES].fill_(_RAISED)

    def _await(self, letters: Sequence[Letter], words: Sequence[Word]) -> None:
        stream, own = torch.cuda.current_stream(self.device.index).cuda_stream, self._addresses[self.place]
        self._driver.wait(stream, [(own + 4 * flag, value) for flag, value in words])


class StagedMailbox(GpuMailbox):
    """Memory of GPUs that do not reach each other's memory: letters go through host memory.

    Receivers acknowledge nothing here either. A rank that may replace a letter has got something back that was computed
    from that letter, so the letter has left host memory too.
    """

    hops = 2

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._in, self._arrived = torch.cuda.Stream(device), torch.cuda.Event()
        self._segment: Segment | None = None
        self._own_flags: torch.Tensor
        super().__init__(group, device)

    def _make(self, nbytes: int) -> None:
        torch.cuda.empty_cache()
        self._memory = self._driver.allocate(nbytes, self.device)
        if self._segment is None or self._segment.nbytes < _FLAG_BYTES + nbytes:
            self._lock(_FLAG_BYTES + nbytes)
        self._own_flags.zero_()

    def _lock(self, nbytes: int) -> None:
        """Have `nbytes` of page-locked host memory, kept when the GPU's memory is freed: locking takes a second a
        GiB."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
            del self._own_flags  # a view that would keep the memory
        self._segment = Segment(
            nbytes, self.place, self.ranks, self.device, self.group, "what the GPUs send each other", REMEDY
        )
        self._own_flags = self._segment.data[self.place][:_FLAG_BYTES]
        self._staging = [self._driver.address_of(data.data_ptr()) for data in self._segment.data]

    def _drop(self) -> None:
        torch.cuda.synchronize(self.device)
        del self._memory

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(*shape)

    def _destination(self, letter: Letter) -> tuple[int, tuple[int, int]]:
        if letter.rank == self.place:
            return self._memory.data_ptr() + letter.offset, letter.strides_there
        return self._packed(letter.rank, letter)

    def _packed(self, receiver: int, letter: Letter) -> tuple[int, tuple[int, int]]:
        """Where a letter lies in host memory on its way to `receiver`."""
        _, rows, width = letter.shape
        return self._staging[receiver] + _FLAG_BYTES + letter.packed, (rows * width, width)

    def _flags_of(self, rank: int) -> int:
        return self._staging[rank]

    def _raise_flags(self) -> None:
        self._own_flags.fill_(_RAISED)

    def _await(self, letters: Sequence[Letter], words: Sequence[Word]) -> None:
        stream, own = self._in.cuda_stream, self._staging[self.place]
        for letter, (flag, value) in zip(letters, words, strict=True):
            self._driver.wait(stream, [(own + 4 * flag, value)])
            if letter.rank != self.place:
                to = self._memory.data_ptr() + letter.offset, letter.strides_there
                self._copy(stream, letter.shape, to, self._packed(self.place, letter))
        self._arrived.record(self._in)
        torch.cuda.current_stream(self.device.index).wait_event(self._arrived)


def open_mailbox(group: dist.ProcessGroup, device: torch.device) -> Mailbox | None:
    """A mailbox for the ranks of a group, or None where no kind works between their GPUs. A collective call."""
    if device.type != "cuda":
        return HostMailbox(group, device)
    apart = _unreached(group, device)
    whys: list[str] = []
    for kind, why in ((PeerMailbox, apart), (StagedMailbox, "")):
        mailbox = None
        if _all(not why, group, device):
            try:
                mailbox = kind(group, device)
            except MailboxError as error:
                why = str(error)
            if _all(mailbox is not None, group, device):
                if whys:
                    log.info("Ulysses' exchanges go through host memory, beside the computation (%s).", whys[0])
                return mailbox
        whys.append(why or "another GPU cannot")
    log.info("Ulysses' exchanges go through NCCL, not beside the computation (%s).", "; ".join(whys))
    return None


def _all(mine: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `mine` is true on every rank. A collective call."""
    every = torch.tensor([mine], device=device, dtype=torch.int32)
    dist.all_reduce(every, dist.ReduceOp.MIN, group=group)
    return bool(every.item())


def _unreached(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why this GPU does not reach those of the other ranks of this host; empty if it does. A collective call."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "NCCL_P2P_DISABLE is set"
    mine = torch.tensor([device.index], device=device)
    every = [torch.empty_like(mine) for _ in dist.get_process_group_ranks(group)]
    dist.all_gather(every, mine, group=group)
    others = (index for index in (int(index) for index in every) if index != device.index)
    unreached = [index for index in others if not torch.cuda.can_device_access_peer(device, index)]
    return f"GPU {device.index} has no access to the memory of GPU {unreached[0]}" if unreached else ""


class MailboxError(RuntimeError):
    """A mailbox does not work between these GPUs. The text says why, without a full stop."""
