"""How each block of a model is whole on the device when its turn comes.

Blocks that are whole on the device stay where they are. The others pass through two buffers: while one block computes,
the next is gathered from the ranks that share it (as ZeRO-3 and FSDP do, arXiv 1910.02054 and 2304.11277) or copied
from host memory, on a stream and in a process group of their own. Parameters are views into the two buffers,
so the model runs unchanged, and its result is bit for bit the result with whole weights.

Order of collectives: a rank starts its gathers in the order of the blocks, from `await_block` alone, which the ranks of
a group call alike (cancel.py lets all of them leave before it at the same block). The end of `prefetching` waits for
the gathers under way, so a cancelled forward leaves no gather unmatched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..comm import timing
from ..comm.collectives import all_gather_single
from ..plan.placement import SLOTS
from .block_states import NO_SLOT, BlockParameters, HostBlock, StreamedBlock
from .block_store import BlockStore
from .device_memory import allocate_segment


class PrefetchBuffers:
    """The two buffers on the device that blocks of all models of a worker pass through, one model at a time.

    Attributes:
        stream: the CUDA stream on which blocks arrive; None without a GPU.
        serial: a number that changes whenever new buffers are allocated.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.serial = 0
        self._buffers: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the device that the buffers take."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers)

    def get(self, nbytes: int) -> tuple[torch.Tensor, ...]:
        """The buffers, each uint8 of at least `nbytes` bytes."""
        if not self._buffers or len(self._buffers[0]) < nbytes:
            self._buffers = ()
            self._buffers = tuple(allocate_segment(nbytes, self.device) for _ in range(SLOTS))
            self.serial += 1
        return self._buffers

    def release(self) -> None:
        """Free the buffers; every `BlockPrefetcher` must have let go of them (`BlockPrefetcher.leave_buffers`)."""
        self._buffers = ()


class BlockPrefetcher:
    """Makes the blocks of one model whole on the device one after the other, each while the block before computes."""

    def __init__(self, store: BlockStore, buffers: PrefetchBuffers):
        self._store, self._buffers = store, buffers
        self._device, self._group, self._mover = store.device, store.group, store.mover
        self._serial = buffers.serial
        self._streamed: list[StreamedBlock] = []  # those that pass through the buffers in this forward, in their order
        self._parameters: dict[int, tuple[StreamedBlock, BlockParameters]] = {}
        self._reached = self._started = self._total = 0  # turns of streamed blocks: one a block and pass
        self._arrivals: dict[int, torch.cuda.Event | dist.Work | None] = {}

    @contextmanager
    def prefetching(self, count: int) -> Iterator[None]:
        """A forward that runs the blocks `count` times, each with `await_block` ahead of it, in their order.

        The end of the `with` block, also by an exception, waits for copies and gathers under way.
        """
        try:
            self._begin(count)
            yield
        finally:
            self._end()

    def await_block(self, number: int) -> None:
        """Have a block whole on the device (for what the current stream does next), and the next one under way."""
        if number not in self._parameters:
            self._start_until(self._reached + SLOTS)
            return
        block, parameters = self._parameters[number]
        turn = self._reached
        self._start_until(turn + 1)
        self._await(turn)
        slot = turn % SLOTS
        if parameters.slot != slot:
            if slot not in parameters.views:
                buffer = self._buffers.get(block.flat.nbytes)[slot]
                parameters.views[slot] = block.flat.views(buffer[: block.flat.nbytes])
            parameters.point_into(slot)
        # the block before has been launched, so its buffer is free once the block has run
        self._start_until(turn + SLOTS)
        self._reached = turn + 1

    def leave_buffers(self) -> None:
        """Let the parameters point nowhere, so that the buffers can be released. Not during a forward."""
        for number, parameters in self._store.parameters.items():
            if parameters.slot != NO_SLOT:
                self._store.detach(number)

    def _begin(self, count: int) -> None:
        streamed = self._store.streamed
        self._streamed = list(streamed.values())
        self._parameters = {number: (block, self._store.parameters[number]) for number, block in streamed.items()}
        self._reached = self._started = 0
        self._total = count * len(streamed)
        if streamed:
            self._buffers.get(max(block.flat.nbytes for block in self._streamed))
            if self._serial != self._buffers.serial:
                self._serial = self._buffers.serial
                for number in streamed:
                    self._store.detach(number)
        self._start_until(SLOTS)

    def _end(self) -> None:
        for turn in sorted(self._arrivals):
            self._await(turn)
        if self._buffers.stream is not None:
            self._buffers.stream.synchronize()
        self._streamed, self._parameters = [], {}  # references that would keep blocks on the device which leave later

    def _start_until(self, turn: int) -> None:
        while self._started < min(turn, self._total):
            block = self._streamed[self._started % len(self._streamed)]
            buffer = self._buffers.get(block.flat.nbytes)[self._started % SLOTS]
            self._arrivals[self._started] = self._start(block, buffer[: block.flat.nbytes])
            self._started += 1

    def _start(self, block: StreamedBlock, whole: torch.Tensor) -> torch.cuda.Event | dist.Work | None:
        """Begin to fill the buffer `whole` with a block; returns the event or gather to wait for."""
        if self._buffers.stream is None:
            return self._fill(block, whole, waits=False)
        free = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._buffers.stream):
            self._buffers.stream.wait_event(free)
            self._fill(block, whole, waits=True)
            return self._buffers.stream.record_event()

    def _fill(self, block: StreamedBlock, whole: torch.Tensor, waits: bool) -> dist.Work | None:
        size = block.flat.nbytes // self._group.ranks
        share = whole[size * self._group.index : size * (self._group.index + 1)]
        if isinstance(block, HostBlock):
            share.copy_(block.buffer.bytes, non_blocking=True)
            self._mover.moved_in += len(block.buffer.bytes)
        if self._group.ranks == 1:
            return None
        source = share if isinstance(block, HostBlock) else block.data
        return all_gather_single(whole, source, group=self._group.group, async_op=not waits)

    def _await(self, turn: int) -> None:
        arrival = self._arrivals.pop(turn)
        with timing.measure_wait(timing.WEIGHTS, self._group.group):
            if isinstance(arrival, torch.cuda.Event):
                torch.cuda.current_stream(self._device).wait_event(arrival)
            elif arrival is not None:
                arrival.wait()
