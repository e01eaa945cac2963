"""Tells a process that hangs from one that is slow, or waits for another: from its signs and from /proc.

A process is *silent* while its signs (see shm/signs.py) stay the same. Then /proc tells whether it is stopped, whether
it works (it computes, the system reads or swaps for it), or whether it is at rest. Who is at rest and has said that it
waits for other ranks is not the one that hangs, as long as any other rank may be.

Seconds are counted from look to look, and a long pause between two looks counts as a short one: where the whole host
stood still (a suspended virtual machine, a frozen container), nobody has been silent. Imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..protocol.silence import STILL, STOPPED, WORKING, SilenceLimits, SilentProcess
from ..shm.signs import Activity, Mark, Sign

_LONGEST_PAUSE = 2
"""So many ticks (see `SilenceLimits`) count at most between two looks."""
_WORK = 0.05
"""Processor time of a process that works, as a part of the time: threads that only look at something take less."""

NO_SIGN = Sign(0, Activity.STARTING, 0, 0, Mark.NONE)
"""Of a process that has not begun to show signs."""


@dataclass(frozen=True)
class ProcessState:
    """What /proc tells of a process.

    Args:
        letter: its state, such as R (runs), S (sleeps), D (the disk or the driver), T and t (stopped).
        cpu: seconds of processor time that it has taken.
        faults: pages that the system has read for it.
    """

    letter: str
    cpu: float
    faults: int

    @classmethod
    def of(cls, pid: int) -> ProcessState | None:
        """The state of a process; None where there is none."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return cls(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[9]))


@dataclass(eq=False)
class _Watched:
    """A process that has something to do, from one look to the next.

    Attributes:
        silent: seconds since its last sign.
        still: seconds since its last sign, or since it last worked.
        stopped: seconds for which it has been stopped.
        is_suspect: whether it is at rest, and nobody else can be the cause; `suspected` counts the seconds.
    """

    name: str
    pid: int
    sign: Sign
    state: ProcessState | None
    silent: float = 0.0
    still: float = 0.0
    stopped: float = 0.0
    is_suspect: bool = False
    suspected: float = 0.0

    def look(self, sign: Sign, state: ProcessState | None, seconds: float) -> None:
        """Note what the process shows after `seconds`."""
        signed = sign.count != self.sign.count
        worked = not sign.is_waiting and _worked(self.state, state, seconds)  # who waits may do so in a busy loop
        self.silent = 0.0 if signed else self.silent + seconds
        self.still = 0.0 if signed or worked else self.still + seconds
        self.stopped = self.stopped + seconds if state is not None and state.letter in "Tt" else 0.0
        self.sign, self.state = sign, state

    @property
    def progress(self) -> tuple[bool, int]:
        """How far it has come with what all do."""
        return self.sign.activity is not Activity.IDLE, self.sign.done

    def is_active(self, limits: SilenceLimits) -> bool:
        """Whether it works, as far as one can see."""
        return self.stopped == 0.0 and self.still < self._patience(limits)

    def suspect(self, suspected: bool, seconds: float) -> None:
        """Count the seconds since the last look, or forget those before."""
        self.is_suspect, self.suspected = suspected, self.suspected + seconds if suspected else 0.0

    def silence(self, limits: SilenceLimits) -> SilentProcess | None:
        """What is to be said of the process; None where nothing is."""
        announced = self.sign.is_announced
        if self.stopped >= limits.warn:
            kind, past = STOPPED, self.stopped
        elif self.is_suspect:
            kind, past = STILL, self.suspected + self._patience(limits)
        elif self.silent >= limits.told and self.is_active(limits) and not self.sign.is_waiting:
            kind, past = WORKING, self.silent
        else:
            return None
        left = limits.end(kind, announced) - past
        return SilentProcess(self.name, self.pid, str(self.sign), kind, self.silent, left)

    def _patience(self, limits: SilenceLimits) -> float:
        """Seconds for which nothing is said about its rest."""
        return limits.told if self.sign.is_announced else limits.warn


def _worked(before: ProcessState | None, now: ProcessState | None, seconds: float) -> bool:
    if before is None or now is None:
        return False
    return now.letter in "RD" or now.faults > before.faults or now.cpu - before.cpu > _WORK * seconds


@dataclass(frozen=True)
class Observed:
    """A process of which something is expected now.

    Args:
        key: tells it from the others.
        name: what it is, in words.
    """

    key: int
    name: str
    pid: int
    sign: Sign


class SilenceWatch:
    """Looks at the processes of one host again and again.

    Args:
        clock: gives seconds; `state_of` what /proc tells of a process id.
    """

    def __init__(
        self,
        limits: SilenceLimits,
        clock: Callable[[], float] = time.monotonic,
        state_of: Callable[[int], ProcessState | None] = ProcessState.of,
    ):
        self.limits, self._clock, self._state_of = limits, clock, state_of
        self._watched: dict[int, _Watched] = {}
        self._looked = clock()

    def look(self, expected: Sequence[Observed], together: bool = True) -> tuple[SilentProcess, ...]:
        """The processes that are the cause of nothing happening, the one with the least time left first.

        Args:
            expected: all of which something is expected.
            together: whether they wait for each other, and don't always say so.
        """
        now = self._clock()
        seconds, self._looked = min(now - self._looked, _LONGEST_PAUSE * self.limits.tick), now
        watched = {}
        for one in expected:
            known, state = self._watched.get(one.key), self._state_of(one.pid)
            if known is None or known.pid != one.pid:
                known = _Watched(one.name, one.pid, one.sign, state)
            else:
                known.look(one.sign, state, seconds)
            watched[one.key] = known
        self._watched = watched
        suspects = self._suspects(list(watched.values()), together)
        for process in watched.values():
            process.suspect(process in suspects, seconds)
        silent = [told for process in watched.values() if (told := process.silence(self.limits)) is not None]
        return tuple(sorted(silent, key=lambda told: told.left))

    def _suspects(self, watched: list[_Watched], together: bool) -> list[_Watched]:
        """Those at rest who wait for nobody else."""
        still = [one for one in watched if one.stopped == 0.0 and not one.is_active(self.limits)]
        if not together:
            return still
        free = [one for one in watched if not one.sign.is_waiting] or watched
        if any(one.stopped or one.is_active(self.limits) for one in free):
            return []
        suspects = [one for one in still if one in free]
        least = min((one.progress for one in suspects), default=None)
        return [one for one in suspects if one.progress == least]
