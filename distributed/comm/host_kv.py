"""Exchange of patches' keys and values through host memory, by the copy engines of the GPUs.

A gather by NCCL runs on the multiprocessors that attention needs, and on GPUs without peer access it goes through
host memory anyway. Here each rank copies its tensors into memory that all ranks have pinned, and fetches the tensors
of the other ranks shortly before it needs them. So computation goes on undisturbed, and no GPU holds the keys and
values of the other patches for all layers: host memory holds them, once for all ranks.

Each rank writes into the shared memory how far it is. A tensor is fetched once its owner has stored the tensor, and
replaced by a newer one once every other rank has fetched the older one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..shm.pinned import PinnedSharedMemory

FETCHED_AHEAD = 3
"""How many tensors, each with the parts of all ranks, are on the GPU at a time: one is being read, the next ones are on
their way."""

_SPIN_SECONDS = 20e-6
_STORED, _FETCHED = 0, 1  # words of the header: how many tensors this rank has stored, and fetched or passed over


@dataclass(frozen=True)
class _Waiting:
    """A tensor that is to be stored in host memory, and may be from the event `ready` on (on a CPU, at once)."""

    number: int
    idx: int
    tensor: torch.Tensor
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class _Storing:
    """A tensor on its way to host memory, which has arrived there at the event `done` (on a CPU, at once)."""

    number: int
    tensor: torch.Tensor  # kept until `done`
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class _Kind:
    """The shape and dtype that all buffers of a manager have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _Progress:
    """How many tensors were stored, fetched and read; all ranks count the same tensors in the same order."""

    order: list[int] = field(default_factory=list)  # idx of each tensor ever enqueued
    fetches_started: int = 0
    arrived: int = 0


class _CopyStream:
    """Makes copies beside the computation, on a stream of its own; on a CPU, at once."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copy pairs of target and source once `after` has come; returns the event of their end."""
        if self._stream is None:
            for target, source in copies:
                target.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            return _recorded_event(self._stream.device)

    def synchronize(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


class HostManager:
    """The buffers of `kv_buffers.BufferManager`, exchanged through a `PinnedSharedMemory` of host memory (see the
    module).

    Args:
        group_rank: this rank's position among the `ranks` that share the buffers.
    """

    def __init__(self, group_rank: int, ranks: int, device: torch.device):
        self.group_rank, self.ranks, self.device = group_rank, ranks, device
        self._registered: list[_Kind] = []
        self._up, self._down = _CopyStream(device), _CopyStream(device)

    def register_tensor(self, shape: tuple[int, ...], torch_dtype: torch.dtype) -> int:
        """Ask for a buffer; returns its index. All have one shape and dtype."""
        kind = _Kind(tuple(shape), torch_dtype)
        if self._registered and self._registered[0] != kind:
            raise ValueError("All buffers that go through host memory have one shape and dtype. Use a second manager.")
        self._registered.append(kind)
        return len(self._registered) - 1

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of this rank's tensors."""
        return self._registered[0].nbytes

    @property
    def registered_bytes(self) -> int:
        """Bytes of all of this rank's tensors, which a segment must have room for."""
        return len(self._registered) * self.tensor_bytes

    def create_buffer(self, segment: PinnedSharedMemory) -> None:
        """Take a segment of at least `registered_bytes` into use.

        Its words are reset: every rank must pass a collective call before it goes on.
        """
        self.segment = segment
        self._staging = torch.empty(FETCHED_AHEAD, self.ranks, self.tensor_bytes, dtype=torch.uint8, device=self.device)
        self._progress = _Progress()
        self._waiting: deque[_Waiting] = deque()
        self._storing: deque[_Storing] = deque()
        self._fetching: deque[torch.cuda.Event | None] = deque()
        self._fetch_events: dict[int, torch.cuda.Event | None] = {}
        self._read: dict[int, torch.cuda.Event | None] = {}
        self._replaced: dict[int, int] = {}  # idx to the number of its last tensor
        self._settled = 0
        own = segment.words[self.group_rank]
        own[_STORED] = own[_FETCHED] = 0

    @property
    def nbytes(self) -> int:
        """Bytes on this rank's GPU."""
        return self._staging.nbytes

    def enqueue(self, idx: int, tensor: torch.Tensor) -> None:
        """Start to send this rank's tensor to the other ranks, which have the tensor after `arrive(idx)`."""
        tensor = tensor.contiguous()
        self._read[self._progress.arrived - 1] = _recorded_event(self.device)  # read by now
        self._waiting.append(_Waiting(len(self._progress.order), idx, tensor, _recorded_event(self.device)))
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
        kind = self._registered[idx]
        return [part.view(kind.dtype).view(kind.shape) for part in staging.unbind()]

    def settle(self, everything: bool = False) -> None:
        """End a step: store the tensors of earlier steps, so that other ranks can fetch them without help of this rank.

        Other ranks may still need the tensors when this rank has left the step, at its end or because the step was
        cancelled. Tensors that this step enqueued are stored during the next step or, with `everything`, now.
        """
        old, self._settled = self._settled, len(self._progress.order)
        if everything:
            old = self._settled

        def settled() -> bool:
            numbers = itertools.chain((t.number for t in self._storing), (t.number for t in self._waiting))
            return not self._fetching and not any(number < old for number in numbers)

        self._serve_until(settled)

    def clear(self) -> None:
        """Wait for the copies that are on their way, and drop all other tensors."""
        self._up.synchronize()
        self._down.synchronize()
        self._waiting.clear()
        self._storing.clear()

    def _serve_until(self, reached: Callable[[], bool]) -> None:
        """Wait until `reached` says yes, and serve the other ranks meanwhile, as each may be waiting for this rank."""
        self._serve()
        while not reached():
            time.sleep(_SPIN_SECONDS)
            self._serve()

    def _serve(self) -> None:
        """Tell the other ranks how far this rank is, and start all copies that can start."""
        own = self.segment.words[self.group_rank]
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
        """How many tensors the slowest other rank has stored or fetched, by `word`."""
        return min(words[word] for rank, words in enumerate(self.segment.words) if rank != self.group_rank)

    def _may_store(self, idx: int) -> bool:
        return idx not in self._replaced or self._others(_FETCHED) > self._replaced[idx]

    def _may_fetch(self) -> bool:
        number = self._progress.fetches_started
        room = number - self._progress.arrived + 1 < FETCHED_AHEAD  # what arrived last is still being read
        return room and number < len(self._progress.order) and self._others(_STORED) > number

    def _store(self, waiting: _Waiting) -> None:
        self._replaced[waiting.idx] = waiting.number
        source = waiting.tensor.view(-1).view(torch.uint8)
        done = self._up.copy([(self._bytes_in(waiting.idx, self.group_rank), source)], after=waiting.ready)
        self._storing.append(_Storing(waiting.number, waiting.tensor, done))

    def _fetch(self) -> None:
        number = self._progress.fetches_started
        self._progress.fetches_started += 1
        staging = self._staging[number % FETCHED_AHEAD]
        others = [(self.group_rank + i) % self.ranks for i in range(1, self.ranks)]  # not all from one rank at once
        idx, read = self._progress.order[number], self._read.pop(number - FETCHED_AHEAD, None)
        event = self._down.copy([(staging[rank], self._bytes_in(idx, rank)) for rank in others], after=read)
        self._fetch_events[number] = event
        self._fetching.append(event)

    def _bytes_in(self, idx: int, rank: int) -> torch.Tensor:
        """The bytes of buffer `idx` in the memory of `rank`."""
        return self.segment.data[rank][idx * self.tensor_bytes : (idx + 1) * self.tensor_bytes]


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """An event on the current stream, after what the stream has to do so far; none on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _done(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
