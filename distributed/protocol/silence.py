"""Processes that show no sign of life: how long a pool waits for them, and what a user reads of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .pool_errors import PoolError

VARIABLE = "WANPARALLEL_SILENCE_LIMIT"
"""The environment variable that sets `SilenceLimits.limit`."""

STOPPED, STILL, WORKING = "stopped", "still", "working"
"""What a silent process is: stopped by a signal or a debugger; at rest, for whatever reason; or at work without coming
to its next step."""

_WHAT = {
    STOPPED: "the process is stopped (by a signal, a debugger or a suspended session)",
    STILL: "the process neither computes nor reads",
    WORKING: "the process is still at work",
}


@dataclass(frozen=True)
class SilenceLimits:
    """After how many seconds without a sign of life something is done about a process.

    Args:
        limit: after these a process at rest is ended, with its pool. The others follow from it.
    """

    limit: float = 120.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SilenceLimits:
        """The limits that a user has set, or the default ones.

        Raises:
            PoolError: the variable holds no number of seconds.
        """
        told = environment.get(VARIABLE, "")
        if not told:
            return cls()
        try:
            seconds = float(told)
        except ValueError:
            seconds = math.nan
        if not 1 <= seconds <= 86400:
            raise PoolError(f"{VARIABLE} is {told!r}. Set it to a number of seconds from 1 to 86400, or unset it.")
        return cls(seconds)

    @property
    def warn(self) -> float:
        """Until it is said that a process is stopped or at rest: 10 s of the default."""
        return min(10.0, self.limit / 12)

    @property
    def told(self) -> float:
        """Until it is said that a process has worked for long without coming to its next step."""
        return self.limit / 2

    @property
    def tick(self) -> float:
        """Between two looks."""
        return min(1.0, self.warn / 4)

    def end(self, kind: str, announced: bool = False) -> float:
        """Until the pool is ended for a process of that kind.

        Args:
            announced: whether the process had said that its step may take long.
        """
        if kind == STOPPED:
            return self.limit / 3
        return self.limit * (15 if kind == WORKING else 5 if announced else 1)


@dataclass(frozen=True)
class SilentProcess:
    """A process without a sign of life.

    Args:
        name: what it is, such as "Worker rank 1".
        doing: what it was doing.
        kind: `STOPPED`, `STILL` or `WORKING`.
        seconds: since its last sign.
        left: seconds until the pool is ended for it.
    """

    name: str
    pid: int
    doing: str
    kind: str
    seconds: float
    left: float

    def warning(self, elapsed: float = 0.0) -> str:
        """What a user reads while the pool waits, `elapsed` seconds after this was noted."""
        left = max(0.0, self.left - elapsed)
        remedy = {
            STOPPED: f"Let it go on with `kill -CONT {self.pid}`, or press Cancel; the pool is ended in {left:.0f} s.",
            STILL: f"Wait, or press Cancel; the pool is ended in {left:.0f} s.",
            WORKING: f"Wait, or press Cancel; the pool is ended if this lasts {left:.0f} s more.",
        }
        return f"{self._silent(elapsed)} {remedy[self.kind]}"

    def ended(self) -> str:
        """Why the pool was ended, as a sentence."""
        return f"{self._silent(0.0)[:-1]}, so the pool was ended."

    def _silent(self, elapsed: float) -> str:
        seconds = self.seconds + elapsed
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
        return (
            f"{self.name} (pid {self.pid}) has shown no sign of life for {seconds:.0f} s, since {since}, "
            f"{self.doing}: {_WHAT[self.kind]}."
        )


@dataclass(frozen=True)
class Silence:
    """To the client: the processes that show no sign of life, as often as it changes; none where all do again."""

    processes: tuple[SilentProcess, ...]
