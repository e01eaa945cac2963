"""Exchange of patches' keys and values through host memory, by the copy engines of the GPUs.

A gather by NCCL runs on the multiprocessors that attention needs, and on GPUs without peer access it goes through
host memory anyway. Here each rank copies its tensors into memory that all ranks have pinned, and fetches those of
the others shortly before it needs them. So computation goes on undisturbed, and no GPU holds the other patches'
keys and values of all layers, which host memory does once for all.

Ranks tell each other in that memory how far they are: a tensor is fetched once its owner has stored it, and stored
again once every other rank has fetched what it replaces.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..shm.pinned import Segment

FETCHED_AHEAD = 3
"""Tensors of all ranks on the GPU at a time: one being read, and the next ones on their way."""

_SPIN_SECONDS = 20e-6
_STORED, _FETCHED = 0, 1  # words of the header: how many tensors this rank has stored, and fetched or passed over


@dataclass
class _Transfer:
    """The tensor of a number that is to be stored; `ready` once computed, `done` once it lies in host memory."""

    number: int
    idx: int
    tensor: torch.Tensor
    ready: torch.cuda.Event | None
    done: torch.cuda.Event | None = None


@dataclass
class _Progress:
    """What was stored, fetched and read, counted in tensors; all ranks count the same ones."""

    order: list[int] = field(default_factory=list)  # idx of each tensor ever enqueued
    fetches_started: int = 0
    arrived: int = 0


class HostManager:
    """Buffers as `displaced.BufferManager` has them, through a `Segment`. See the module.

    Args:
        segment: of at least `registered_bytes`, given to `create_buffer`.
    """

    def __init__(self, place: int, ranks: int, device: torch.device):
        self.place, self.ranks, self.device = place, ranks, device
        self._shapes: list[tuple[int, ...]] = []
        self._dtype: torch.dtype | None = None
        self._cuda = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if self._cuda else None
        self._down = torch.cuda.Stream(device) if self._cuda else None

    def register_tensor(self, shape: tuple[int, ...], torch_dtype: torch.dtype) -> int:
        """Ask for a buffer; returns its index. All have one shape and dtype."""
        if self._shapes and (self._shapes[0], self._dtype) != (tuple(shape), torch_dtype):
            raise ValueError("All buffers that go through host memory have one shape and dtype. Use a second manager.")
        self._shapes.append(tuple(shape))
        self._dtype = torch_dtype
        return len(self._shapes) - 1

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self._shapes[0]) * self._dtype.itemsize

    @property
    def registered_bytes(self) -> int:
        """Bytes of this rank's tensors."""
        return len(self._shapes) * self.tensor_bytes

    def create_buffer(self, segment: Segment) -> None:
        """Take a segment into use. Its words are reset: every rank must pass a collective call before it goes on."""
        self.segment = segment
        self._staging = torch.empty(FETCHED_AHEAD, self.ranks, self.tensor_bytes, dtype=torch.uint8, device=self.device)
        self._progress = _Progress()
        self._waiting: deque[_Transfer] = deque()
        self._storing: deque[_Transfer] = deque()
        self._fetching: deque[torch.cuda.Event | None] = deque()
        self._fetch_events: dict[int, torch.cuda.Event | None] = {}
        self._read: dict[int, torch.cuda.Event | None] = {}
        self._replaced: dict[int, int] = {}  # idx to the number of its last tensor
        self._settled = 0
        own = segment.words[self.place]
        own[_STORED] = own[_FETCHED] = 0

    @property
    def nbytes(self) -> int:
        """Bytes on this rank's GPU."""
        return self._staging.nbytes

    def enqueue(self, idx: int, tensor: torch.Tensor) -> None:
        """Start to send this rank's tensor to the others. They have it after `arrive(idx)`."""
        tensor = tensor.contiguous()
        self._read[self._progress.arrived - 1] = self._event()  # whatever arrived last has been read by now
        self._waiting.append(_Transfer(len(self._progress.order), idx, tensor, self._event()))
        self._progress.order.append(idx)
        self._serve()

    def arrive(self, idx: int) -> None:
        """Make the device wait for the other ranks' tensors that were enqueued last as `idx`."""
        number = self._progress.arrived
        assert self._progress.order[number] == idx
        self._progress.arrived += 1
        self._serve_until(lambda: self._progress.fetches_started > number)
        event = self._fetch_events.pop(number)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def forget(self, idx: int) -> None:
        """Do without the tensors that were enqueued last as `idx`, if nobody has asked for them yet."""
        progress = self._progress
        number = progress.arrived
        if number < len(progress.order) and progress.order[number] == idx:
            progress.arrived += 1
            if progress.fetches_started == number:
                progress.fetches_started += 1
                self._fetching.append(None)
            self._fetch_events.pop(number, None)
            self._serve()

    def get_buffer_list(self, idx: int) -> list[torch.Tensor]:
        """The tensors of all ranks that `arrive` has just brought, by rank; this rank's own place is not filled."""
        staging = self._staging[(self._progress.arrived - 1) % FETCHED_AHEAD]
        return [part.view(self._dtype).view(self._shapes[idx]) for part in staging.unbind()]

    def settle(self, everything: bool = False) -> None:
        """End a step: see to it that the other ranks can get what was enqueued in earlier ones without this rank.

        They may still need it when this rank has left the step, at its end or because it was cancelled. What this
        step enqueued goes on by the way in the next one, unless `everything` is to be there now.
        """
        old, self._settled = self._settled, len(self._progress.order)
        if everything:
            old = self._settled
        self._serve_until(lambda: not self._fetching and not any(t.number < old for t in self._outgoing()))

    def clear(self) -> None:
        """Wait for what is on its way, and drop the rest."""
        if self._cuda:
            self._up.synchronize()
            self._down.synchronize()
        self._waiting.clear()
        self._storing.clear()

    def _outgoing(self) -> Iterator[_Transfer]:
        return itertools.chain(self._storing, self._waiting)

    def _serve_until(self, reached: Callable[[], bool]) -> None:
        """Serve the others meanwhile: each may be waiting for what this rank has not told it yet."""
        self._serve()
        while not reached():
            time.sleep(_SPIN_SECONDS)
            self._serve()

    def _serve(self) -> None:
        """Tell the others how far this rank is, and start what can be started."""
        own = self.segment.words[self.place]
        while self._storing and _done(self._storing[0].done):
            self._storing.popleft()
            own[_STORED] += 1
        while self._fetching and _done(self._fetching[0]):
            self._fetching.popleft()
            own[_FETCHED] += 1
        while self._waiting and self._may_store(self._waiting[0].idx):
            self._store(self._waiting.popleft())
        while self._may_fetch():
            self._fetch()

    def _others(self, word: int) -> int:
        """How far the slowest other rank is."""
        return min(words[word] for rank, words in enumerate(self.segment.words) if rank != self.place)

    def _may_store(self, idx: int) -> bool:
        return idx not in self._replaced or self._others(_FETCHED) > self._replaced[idx]

    def _may_fetch(self) -> bool:
        number = self._progress.fetches_started
        room = number - self._progress.arrived + 1 < FETCHED_AHEAD  # what arrived last is still being read
        return room and number < len(self._progress.order) and self._others(_STORED) > number

    def _store(self, transfer: _Transfer) -> None:
        self._replaced[transfer.idx] = transfer.number
        target = self._place_of(transfer.idx, self.place)
        source = transfer.tensor.view(-1).view(torch.uint8)
        if self._cuda:
            with torch.cuda.stream(self._up):
                self._up.wait_event(transfer.ready)
                target.copy_(source, non_blocking=True)
                transfer.done = self._event()
        else:
            target.copy_(source)
        self._storing.append(transfer)

    def _fetch(self) -> None:
        number = self._progress.fetches_started
        self._progress.fetches_started += 1
        staging = self._staging[number % FETCHED_AHEAD]
        others = [(self.place + i) % self.ranks for i in range(1, self.ranks)]  # not all from one rank at once
        if self._cuda:
            before = self._read.pop(number - FETCHED_AHEAD, None)
            with torch.cuda.stream(self._down):
                if before is not None:
                    self._down.wait_event(before)
                for rank in others:
                    staging[rank].copy_(self._place_of(self._progress.order[number], rank), non_blocking=True)
                event = self._event()
        else:
            for rank in others:
                staging[rank].copy_(self._place_of(self._progress.order[number], rank))
            event = None
        self._fetch_events[number] = event
        self._fetching.append(event)

    def _place_of(self, idx: int, rank: int) -> torch.Tensor:
        return self.segment.data[rank][idx * self.tensor_bytes : (idx + 1) * self.tensor_bytes]

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def _done(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
