"""Peer memory between GPUs, and which of two kind of peer memory the ranks of a group can have.

A collective call is a kernel, and a kernel takes multiprocessors from the computation beside it. Here the copy engines
carry the transfers, and the front ends of the GPUs write and await the signals, so that neither the multiprocessors nor
the processes have anything to do with an exchange.

Where GPUs reach each other's memory, the sender's GPU writes straight into the receiver's memory. Where they do not, as
most GeForce cards on PCIe, the sender's GPU writes into host memory that all ranks have page-locked, and the receiver's
own copy engine fetches the transfer from there once the signal is there.

Streams may share a queue of the hardware, where a stream that waits holds up another one. No stream is held up for ever
as long as every rank launches the sending of its transfers before it waits for the matching transfers of the other
ranks: each wait is then for a transfer that its sender launched earlier.
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

from ..shm import signs
from ..shm.pinned import HostMemoryError, PinnedSharedMemory
from ..shm.signs import Mark
from .peer_memory import REMEDY, HostPeerMemory, PeerMemory, SignalValue, Transfer
from .stream_ops import StreamMemory, StreamMemoryError

log = logging.getLogger(__name__)

_SIGNAL_BYTES = 4096
_RAISED = 0x3F
"""The value of each byte of a signal that is above every value that is awaited."""
_TRY_SECONDS = 20.0
"""Seconds that the first transfers, of 8 bytes, may take until peer memory is given up."""


class GpuPeerMemory(PeerMemory):
    """Memory of GPUs: streams carry the transfers, and wait for them.

    Raises:
        PeerMemoryError: this kind of peer memory does not work between these GPUs.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        super().__init__(group, device)
        self.processors = tuple(
            _gathered(torch.cuda.get_device_properties(device).multi_processor_count, group, device)
        )
        self._computed = torch.cuda.Event()
        # two streams: copies within a GPU are kernels, which wait until the computation leaves them room
        self._out, self._to_itself = torch.cuda.Stream(device), torch.cuda.Stream(device)
        try:
            self._driver = StreamMemory()
            self.arrange(None, _SIGNAL_BYTES)
            self._try_out()
        except (ImportError, AttributeError, RuntimeError, StreamMemoryError, HostMemoryError) as error:
            self.close()
            raise PeerMemoryError(str(error).splitlines()[0]) from error

    def _try_out(self) -> None:
        """Send every rank this rank's number, and look at the numbers that have arrived."""
        mine = torch.full((1,), self.group_rank, dtype=torch.int64, device=self.device)
        self.hold(mine)
        self.put([_number(rank, self.group_rank) for rank in range(self.ranks)], mine)
        self.wait_signal([_number(rank, rank) for rank in range(self.ranks)])
        arrived, deadline = torch.cuda.Event(), time.monotonic() + _TRY_SECONDS
        arrived.record(torch.cuda.current_stream(self.device.index))
        while not arrived.query():  # a driver may take these operations and not do them
            if time.monotonic() > deadline:
                self._set_all_signals()
                raise StreamMemoryError(f"what the ranks wrote did not arrive within {_TRY_SECONDS:.0f} s")
            time.sleep(1e-3)
        got = self.own(0, (self.ranks,), torch.int64).tolist()
        if got != list(range(self.ranks)):
            raise StreamMemoryError(f"what the ranks wrote did not arrive ({got})")

    def hold(self, tensor: torch.Tensor) -> None:
        """See `PeerMemory`: torch's allocator waits for both streams before it gives the memory out again."""
        tensor.record_stream(self._out)
        tensor.record_stream(self._to_itself)

    def _put(self, transfers: Sequence[Transfer], values: Sequence[int], tensor: torch.Tensor) -> None:
        self._computed.record(torch.cuda.current_stream(self.device.index))
        for stream in (self._out, self._to_itself):
            stream.wait_event(self._computed)
        address = tensor.data_ptr()

        def of_one_signal(sent: tuple[Transfer, int]) -> tuple[bool, int]:
            return sent[0].rank == self.group_rank, sent[0].signal

        for (to_itself, _), together in groupby(zip(transfers, values, strict=True), key=of_one_signal):
            handle, words = (self._to_itself if to_itself else self._out).cuda_stream, []
            for transfer, value in together:
                self._copy(
                    handle, transfer.shape, self._destination(transfer), (address + transfer.start, transfer.strides)
                )
                words.append((self._signals_of(transfer.rank) + 4 * self._signal_index(transfer), value))
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
    def _destination(self, transfer: Transfer) -> tuple[int, tuple[int, int]]:
        """Where this rank writes a transfer: an address, and the strides from matrix to matrix and from row to row."""

    @abstractmethod
    def _signals_of(self, rank: int) -> int:
        """The address of a rank's signals, as this rank's GPU reaches them."""

    @abstractmethod
    def _set_all_signals(self) -> None:
        """Let this rank's streams go on, whichever signals they wait for."""


def _number(rank: int, sender: int) -> Transfer:
    """A transfer of 8 bytes: the number of `sender`."""
    return Transfer(rank, 0, (1, 1, 8), 0, (8, 8), 8 * sender, (8, 8), 8 * sender)


class DirectPeerMemory(GpuPeerMemory):
    """Memory of GPUs that reach each other's memory, by torch's symmetric memory."""

    def _make(self, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.empty_cache()  # symmetric memory takes nothing from torch's cache
        self._memory = symmetric.empty(_SIGNAL_BYTES + nbytes, dtype=torch.uint8, device=self.device)
        self._memory[:_SIGNAL_BYTES].zero_()
        self._peers = symmetric.rendezvous(self._memory, self.group.group_name)
        self._addresses = list(self._peers.buffer_ptrs)
        torch.cuda.synchronize(self.device)

    def _drop(self) -> None:
        torch.cuda.synchronize(self.device)
        del self._peers, self._memory

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._peers.get_buffer(rank, tuple(shape), dtype, (_SIGNAL_BYTES + offset) // dtype.itemsize)

    def _destination(self, transfer: Transfer) -> tuple[int, tuple[int, int]]:
        return self._addresses[transfer.rank] + _SIGNAL_BYTES + transfer.offset, transfer.strides_there

    def _signals_of(self, rank: int) -> int:
        return self._addresses[rank]

    def _set_all_signals(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            self._memory[:_SIGNAL_BYTES].fill_(_RAISED)

    def _wait_signals(self, transfers: Sequence[Transfer], words: Sequence[SignalValue]) -> None:
        stream, own = torch.cuda.current_stream(self.device.index).cuda_stream, self._addresses[self.group_rank]
        self._driver.wait(stream, [(own + 4 * signal, value) for signal, value in words])


class StagedPeerMemory(GpuPeerMemory):
    """Memory of GPUs that do not reach each other's memory: transfers go through host memory.

    Receivers acknowledge nothing here either. A rank that may replace a transfer has got something back that was
    computed from that transfer, so the transfer has left host memory too.
    """

    hops = 2

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._in, self._arrived = torch.cuda.Stream(device), torch.cuda.Event()
        self._segment: PinnedSharedMemory | None = None
        self._own_signals: torch.Tensor
        super().__init__(group, device)

    def _make(self, nbytes: int) -> None:
        torch.cuda.empty_cache()
        self._memory = self._driver.allocate(nbytes, self.device)
        if self._segment is None or self._segment.nbytes < _SIGNAL_BYTES + nbytes:
            self._lock(_SIGNAL_BYTES + nbytes)
        self._own_signals.zero_()

    def _lock(self, nbytes: int) -> None:
        """Have `nbytes` of page-locked host memory, kept when the GPU's memory is freed: locking takes a second a
        GiB."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
            del self._own_signals  # a view that would keep the memory
        self._segment = PinnedSharedMemory(
            nbytes, self.group_rank, self.ranks, self.device, self.group, "what the GPUs send each other", REMEDY
        )
        self._own_signals = self._segment.data[self.group_rank][:_SIGNAL_BYTES]
        self._staging = [self._driver.address_of(data.data_ptr()) for data in self._segment.data]

    def _drop(self) -> None:
        torch.cuda.synchronize(self.device)
        del self._memory

    def _part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(*shape)

    def _destination(self, transfer: Transfer) -> tuple[int, tuple[int, int]]:
        if transfer.rank == self.group_rank:
            return self._memory.data_ptr() + transfer.offset, transfer.strides_there
        return self._packed(transfer.rank, transfer)

    def _packed(self, receiver: int, transfer: Transfer) -> tuple[int, tuple[int, int]]:
        """Where a transfer lies in host memory on its way to `receiver`."""
        _, rows, width = transfer.shape
        return self._staging[receiver] + _SIGNAL_BYTES + transfer.packed, (rows * width, width)

    def _signals_of(self, rank: int) -> int:
        return self._staging[rank]

    def _set_all_signals(self) -> None:
        self._own_signals.fill_(_RAISED)

    def _wait_signals(self, transfers: Sequence[Transfer], words: Sequence[SignalValue]) -> None:
        stream, own = self._in.cuda_stream, self._staging[self.group_rank]
        for transfer, (signal, value) in zip(transfers, words, strict=True):
            self._driver.wait(stream, [(own + 4 * signal, value)])
            if transfer.rank != self.group_rank:
                to = self._memory.data_ptr() + transfer.offset, transfer.strides_there
                self._copy(stream, transfer.shape, to, self._packed(self.group_rank, transfer))
        self._arrived.record(self._in)
        torch.cuda.current_stream(self.device.index).wait_event(self._arrived)


def open_peer_memory(group: dist.ProcessGroup, device: torch.device) -> PeerMemory | None:
    """Peer memory for the ranks of a group, or None where no kind works between their GPUs. A collective call."""
    if device.type != "cuda":
        return HostPeerMemory(group, device)
    apart = _unreached(group, device)
    whys: list[str] = []
    for kind, why in ((DirectPeerMemory, apart), (StagedPeerMemory, "")):
        memory = None
        if _all(not why, group, device):
            try:
                memory = kind(group, device)
            except PeerMemoryError as error:
                why = str(error)
            if _all(memory is not None, group, device):
                if whys:
                    log.info("Ulysses' exchanges go through host memory, beside the computation (%s).", whys[0])
                return memory
        whys.append(why or "another GPU cannot")
    log.info("Ulysses' exchanges go through NCCL, not beside the computation (%s).", "; ".join(whys))
    return None


def _all(mine: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `mine` is true on every rank. A collective call."""
    every = torch.tensor([mine], device=device, dtype=torch.int32)
    with signs.marked(Mark.WAITING):
        dist.all_reduce(every, dist.ReduceOp.MIN, group=group)
        return bool(every.item())


def _unreached(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why this GPU does not reach those of the other ranks of this host; empty if it does. A collective call."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "NCCL_P2P_DISABLE is set"
    others = (index for index in _gathered(device.index, group, device) if index != device.index)
    unreached = [index for index in others if not torch.cuda.can_device_access_peer(device, index)]
    return f"GPU {device.index} has no access to the memory of GPU {unreached[0]}" if unreached else ""


def _gathered(number: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """The `number` of each rank of the group. A collective call."""
    mine = torch.tensor([number], device=device)
    every = [torch.empty_like(mine) for _ in dist.get_process_group_ranks(group)]
    with signs.marked(Mark.WAITING):
        dist.all_gather(every, mine, group=group)
        return [int(theirs) for theirs in every]


class PeerMemoryError(RuntimeError):
    """Peer memory does not work between these GPUs. The text says why, without a full stop."""
