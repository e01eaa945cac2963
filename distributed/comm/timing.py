"""Where the time of a forward went: computing, exchanging with other ranks, waiting for them.

A rank's device stands still where it needs data from elsewhere: an all-to-all, a block of a ring, a sum, the residual
stream of the stage before, weights that are gathered or copied from host memory, latents that come in and go out.
Strategies put `measure_wait` around these places. On CUDA it records a pair of events in the stream that computes, and
the events are read once the forward is over: nothing is synchronised in between, and an exchange that is hidden behind
computation is not counted. On a CPU `measure_wait` reads the clock.

While a rank stands still, the tensors that it needs may be on their way, or not even sent. No rank gets them before all
ranks of the group have come to the same place, and the rank that comes last waits for the transfer alone. So the time
for which a rank stands still at an exchange is divided in two:

- **exchange** is the shortest time for which any rank of the group stood still there,
- **waiting** is the time beyond: until the last rank of the group came to the place. Waiting is also the time for which
  a rank holds back until its leader has come to a block (cancel.py), and the time from the end of this rank's forward
  to the end of the slowest rank's.

The rest of the forward is **compute**: kernels, and the launching of them.

The three add up to the seconds of the forward on every rank. The border between exchange and waiting is sharp where all
ranks take part in a transfer. Where ranks write into each other's memory (peer_memory.py), the last rank may find there
all transfers that it needs; the transfer from the last rank to the other ranks then counts as waiting.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..protocol.reports import WaitTimes
from ..shm import signs
from ..shm.signs import Mark

ALL_TO_ALL, RING, SUMS, PIPELINE, WEIGHTS, PATCHES = "all-to-all", "ring", "sums", "pipeline", "weights", "patches"
LATER_SLICES = "all-to-all of later slices"
"""The all-to-all of a rank's later slices of heads (ulysses_overlap.py): not every rank has as many slices."""
USP = "USP"
"""xfuser's attention without the attention kernel: the exchanges, and the copies around them."""
LATENTS = "latents"
"""Copies of the inputs from the client's memory, and of the result back."""
CANCEL_BARRIER = "gate"
"""The time for which a rank holds back until its leader has come to a block (cancel.py): nothing is exchanged."""

_Key = tuple[str, tuple[int, ...]]
"""The kind of an exchange, and the ranks that take part; no ranks where a rank needs no other one."""


class Spans:
    """Measures stretches of time on a device without making the host wait. To be used on the stream that stands
    still."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []
        self._begin = 0.0

    def start(self) -> None:
        """Begin a stretch."""
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._begin = time.perf_counter()

    def stop(self) -> None:
        """End the stretch that `start` began."""
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds.append(time.perf_counter() - self._begin)

    def each(self) -> list[float]:
        """Seconds of every stretch, in their order. Waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + [start.elapsed_time(stop) / 1000 for start, stop in self._events]


class WaitRecorder:
    """The stretches that `measure_wait` notes down during one forward of this rank.

    Attributes:
        open: the stretches of the kind that is being measured now; None outside `measure_wait`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: dict[_Key, list[Spans]] = {}
        self._own: dict[_Key, Spans] = {}
        self.open: Spans | None = None

    def spans(self, kind: str, ranks: tuple[int, ...]) -> Spans:
        """The stretches of one kind of exchange among `ranks`; the caller adds new ones by `start` and `stop`."""
        key = (kind, ranks)
        if key not in self._own:
            self._own[key] = self.add(kind, ranks, Spans(self._device))
        return self._own[key]

    def add(self, kind: str, ranks: tuple[int, ...], spans: Spans) -> Spans:
        """Count `spans`, stretches that the caller measures; returns them."""
        self._spans.setdefault((kind, ranks), []).append(spans)
        return spans

    def waits(self) -> tuple[WaitTimes, ...]:
        """All stretches, by kind and group.

        Waits for the stream that computes, not for tensors that other ranks still send for a later forward.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return tuple(
            WaitTimes.of(kind, ranks, itertools.chain.from_iterable(part.each() for part in parts))
            for (kind, ranks), parts in self._spans.items()
        )


_current: WaitRecorder | None = None
"""The measurement of the forward that runs; one, as a process has one device and does one request at a time."""


@contextmanager
def measuring(device: torch.device) -> Iterator[WaitRecorder]:
    """Let `measure_wait` measure until the end of the `with` block, which is one forward; yields the measurement."""
    global _current
    _current = WaitRecorder(device)
    try:
        yield _current
    finally:
        _current = None


@contextmanager
def measure_wait(kind: str, among: Sequence[int] | dist.ProcessGroup | None = None) -> Iterator[None]:
    """Measure, until the end of the `with` block, how long the stream that computes waits for an exchange.

    Measures nothing outside a forward, for a rank alone, and inside another `measure_wait`, which counts the whole. The
    signs of this rank say meanwhile that it waits for others.

    Args:
        kind: what is exchanged, or waited for.
        among: the ranks that take part, or their group. All of them make the same calls of `measure_wait` in the same
            order.
    """
    watch, ranks = _current, _ranks(among)
    marks = signs.mark(Mark.WAITING if ranks else Mark.NONE)
    if watch is None or watch.open is not None or ranks is None:
        try:
            yield
        finally:
            signs.restore(marks)
        return
    watch.open = watch.spans(kind, ranks)
    watch.open.start()
    try:
        yield
    finally:
        signs.restore(marks)
        spans, watch.open = watch.open, None
        spans.stop()


@contextmanager
def computing() -> Iterator[None]:
    """Leave the time until the end of the `with` block, which is computation, out of the `measure_wait` around it."""
    watch = _current
    if watch is None or watch.open is None:
        yield
        return
    spans, watch.open = watch.open, None
    spans.stop()
    marks = signs.mark(Mark.NONE, Mark.WAITING)
    try:
        yield
    finally:
        signs.restore(marks)
        watch.open = spans
        spans.start()


def count_wait(kind: str, among: Sequence[int] | dist.ProcessGroup | None, spans: Spans) -> Spans:
    """Let the forward that runs count `spans`, stretches that the caller measures and reads too; returns them."""
    return spans if _current is None else _current.add(kind, _ranks(among) or (), spans)


def _ranks(among: Sequence[int] | dist.ProcessGroup | None) -> tuple[int, ...] | None:
    """The ranks that exchange: () for a rank that needs no other; None for a group of one rank, which never waits."""
    if among is None:
        return ()
    ranks = tuple(among if isinstance(among, Sequence) else dist.get_process_group_ranks(among))
    return ranks if len(ranks) > 1 else None


@dataclass(frozen=True)
class RankTimes:
    """Where the seconds of a forward went on one rank (see the module).

    Args:
        exchanges: seconds of each kind of exchange, which add up to `exchange`.
    """

    compute: float
    exchange: float
    waiting: float
    exchanges: tuple[tuple[str, float], ...] = ()

    @property
    def total(self) -> float:
        """Seconds of the whole forward."""
        return self.compute + self.exchange + self.waiting


def rank_times(seconds: Sequence[float], waits: Sequence[Sequence[WaitTimes]]) -> tuple[RankTimes, ...]:
    """Where the seconds of a forward went on each rank.

    Args:
        seconds: of the forward, by rank.
        waits: the times for which each rank stood still, by rank.
    """
    stood = [{(wait.kind, wait.ranks): wait.seconds for wait in own} for own in waits]
    times = []
    for rank, own in enumerate(stood):
        exchanges: dict[str, float] = {}
        for (kind, ranks), spans in own.items():
            if kind != CANCEL_BARRIER:
                groups = (stood[other].get((kind, ranks), []) for other in ranks or (rank,))
                least = sum(_least(groups)[: len(spans)])
                exchanges[kind] = exchanges.get(kind, 0.0) + least
        exchange, still = sum(exchanges.values()), sum(sum(spans) for spans in own.values())
        compute = max(0.0, seconds[rank] - still)  # a GPU's clock and the host's differ by microseconds
        waiting = max(0.0, max(seconds) - compute - exchange)
        times.append(RankTimes(compute, exchange, waiting, tuple(sorted(exchanges.items()))))
    return tuple(times)


def _least(groups: Iterator[list[float]]) -> list[float]:
    """The shortest time of each exchange over the ranks that took part in the exchange."""
    return [min(s for s in one if s is not None) for one in itertools.zip_longest(*groups)]
