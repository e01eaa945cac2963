"""Signs of life: what each process of a pool is doing, in shared memory that others read without asking the process.

A stopped process is not a dead one: no pipe of it closes, and nothing tells of it. So every rank counts its steps here,
one before each block, each weight that it reads, each piece of a video, and says what it is about to do. A sign is a
few stores, about a microsecond. Whoever started the processes reads them (see executors/silence_watch.py).

Imports no torch: the launcher shows signs too.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

_WORD = 8  # bytes
_ROW = 8  # words of one process: a cache line, so that ranks don't slow each other down
_COUNT, _ACTIVITY, _DONE, _TOTAL, _MARKS = range(5)

LAUNCHER = -1
"""The row of the process between the client and the ranks, beside those of the ranks."""


class Activity(IntEnum):
    """What a process is doing."""

    STARTING = 0
    JOINING = 1
    IDLE = 2
    LOADING = 3
    MERGING = 4
    FORWARD = 5
    UNLOADING = 6
    OFFLOADING = 7
    TRIMMING = 8
    REPORTING = 9
    PROBING = 10
    REGROUPING = 11
    LOADING_VAE = 12
    DECODING = 13
    ENCODING = 14
    PASSING_ON = 15


class Mark:
    """What else is true of the step that is under way, as bits of a number. (Python's own flags take microseconds.)

    Attributes:
        WAITING: other ranks have to do something first.
        FIRST: the first of its kind, which may build kernels and connections.
        PAGE_LOCKING: the system locks memory for the GPUs' copy engines, a second for each GiB.
        DEVICE: the GPU has to finish something first.
    """

    NONE = 0
    WAITING = 1
    FIRST = 2
    PAGE_LOCKING = 4
    DEVICE = 8


_WORDS = {
    Activity.STARTING: ("starting", ""),
    Activity.JOINING: ("joining the other workers", ""),
    Activity.IDLE: ("before it took the request up", ""),
    Activity.LOADING: ("loading a model", "weight"),
    Activity.MERGING: ("merging LoRAs", "weight"),
    Activity.FORWARD: ("in a forward", "block"),
    Activity.UNLOADING: ("unloading models", ""),
    Activity.OFFLOADING: ("moving weights to host memory", ""),
    Activity.TRIMMING: ("giving memory back", ""),
    Activity.REPORTING: ("telling its status", ""),
    Activity.PROBING: ("measuring its device", ""),
    Activity.REGROUPING: ("changing the plan", ""),
    Activity.LOADING_VAE: ("taking a VAE's weights", ""),
    Activity.DECODING: ("decoding a video", "piece"),
    Activity.ENCODING: ("encoding a video", "piece"),
    Activity.PASSING_ON: ("passing messages on", ""),
}
_MARK_WORDS = {
    Mark.FIRST: "for the first time in this size",
    Mark.PAGE_LOCKING: "page-locking memory",
    Mark.DEVICE: "waiting for its GPU",
    Mark.WAITING: "waiting for other ranks",
}


@dataclass(frozen=True)
class Sign:
    """What a process has shown last.

    Args:
        count: changes with every sign; 0 before the first.
        done, total: steps of the activity that have begun, and all of them; 0 where nobody counts them.
    """

    count: int
    activity: Activity
    done: int
    total: int
    marks: int

    @property
    def is_announced(self) -> bool:
        """Whether the process has said that its next sign may take long."""
        return self.activity in (Activity.STARTING, Activity.JOINING) or bool(
            self.marks & (Mark.FIRST | Mark.PAGE_LOCKING)
        )

    @property
    def is_waiting(self) -> bool:
        """Whether other ranks have to do something before this one can go on."""
        return self.activity is Activity.JOINING or bool(self.marks & Mark.WAITING)

    def __str__(self) -> str:
        doing, step = _WORDS[self.activity]
        place = f" ({step} {self.done}{f' of {self.total}' if self.total else ''})" if step and self.done else ""
        return ", ".join([doing + place, *(text for mark, text in _MARK_WORDS.items() if mark & self.marks)])


class ProcessSigns:
    """One process's side: shows what the process is doing."""

    def __init__(self, words: memoryview):
        self._words = words

    def beat(self) -> None:
        """Show that the process runs."""
        self._words[_COUNT] += 1

    def begin(self, activity: Activity, total: int = 0) -> None:
        """Say what the process does from now on, in `total` steps (0: not known)."""
        words = self._words
        words[_ACTIVITY], words[_DONE], words[_TOTAL] = activity, 0, total
        words[_COUNT] += 1

    def step(self) -> None:
        """Begin the next step."""
        self._words[_DONE] += 1
        self._words[_COUNT] += 1

    def mark(self, added: int, removed: int = 0) -> int:
        """Add marks and take marks away; returns the marks before, for `restore`."""
        words = self._words
        before = words[_MARKS]
        words[_MARKS] = (before | added) & ~removed
        words[_COUNT] += 1
        return before

    def restore(self, marks: int) -> None:
        """Set the marks that `mark` has returned."""
        self._words[_MARKS] = marks
        self._words[_COUNT] += 1


class SignsTable:
    """The signs of the launcher and of all ranks of one host.

    Args:
        fd: of the memory, which this object closes.
        path: under which processes of this user open the memory.
    """

    def __init__(self, fd: int, path: str):
        self._fd, self.path = fd, path
        self._words = memoryview(mmap.mmap(fd, 0)).cast("q")  # all of the file

    @classmethod
    def create(cls, ranks: int) -> SignsTable:
        """A table for ranks numbered from 0. Whoever starts the launcher makes it."""
        fd = os.memfd_create("wan-parallel-signs")
        os.ftruncate(fd, _WORD * _ROW * (1 + ranks))
        return cls(fd, f"/proc/{os.getpid()}/fd/{fd}")

    @classmethod
    def open(cls, path: str) -> SignsTable:
        """The table that another process has made."""
        return cls(os.open(path, os.O_RDWR), path)

    def read(self, rank: int) -> Sign:
        """What a rank, or the launcher (`LAUNCHER`), has shown last."""
        row = self._row(rank)
        return Sign(row[_COUNT], Activity(row[_ACTIVITY]), row[_DONE], row[_TOTAL], row[_MARKS])

    def of(self, rank: int) -> ProcessSigns:
        """The side of a rank, or of the launcher."""
        return ProcessSigns(self._row(rank))

    def close(self) -> None:
        """Let nobody else open the memory; who has it open keeps it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _row(self, rank: int) -> memoryview:
        start = _ROW * (rank + 1)
        return self._words[start : start + _ROW]


# What a worker shows. Deep inside of it, as in timing.py, one object for the process: it does one request at a time.

_own = ProcessSigns(memoryview(bytearray(_WORD * _ROW)).cast("q"))  # which nobody reads, until `show_in`


def show_in(path: str, rank: int) -> None:
    """Show this process's signs in the table at `path` from now on, as those of `rank`."""
    global _own
    table = SignsTable.open(path)
    _own = table.of(rank)
    table.close()


def begin(activity: Activity, total: int = 0) -> None:
    """See `ProcessSigns.begin`."""
    _own.begin(activity, total)


def step() -> None:
    """See `ProcessSigns.step`."""
    _own.step()


def mark(added: int, removed: int = 0) -> int:
    """See `ProcessSigns.mark`."""
    return _own.mark(added, removed)


def restore(marks: int) -> None:
    """See `ProcessSigns.restore`."""
    _own.restore(marks)


@contextmanager
def marked(added: int) -> Iterator[None]:
    """Have a mark set until the end of the `with` block."""
    before = mark(added)
    try:
        yield
    finally:
        restore(before)
