"""What a fault is, and how faults are drawn from a seed: the same seed and number give the same fault."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KILL_WORKER = "kill -9 of a worker"
KILL_LAUNCHER = "kill -9 of the launcher"
KILL_ZYGOTE = "kill -9 of the process that starts workers"
KILL_CLIENT = "kill -9 of the client"
SIGNAL = "another signal to a worker or the launcher"
SIGNAL_CLIENT = "another signal to the client"
STOP = "stopped for good"
STOP_AND_GO = "stopped, and going on in time"
CANCEL = "cancel"
CANCEL_STOPPED = "cancel beside a stopped process"
FILE = "another file"
POOL = "other settings, unload, trim, status, close"
DISK = "a full disk"
DESCRIPTORS = "few file descriptors"
USER = "another user without a home"
HOME = "a read-only home"

KINDS = (
    KILL_WORKER,
    CANCEL,
    STOP_AND_GO,
    FILE,
    SIGNAL,
    POOL,
    KILL_LAUNCHER,
    DESCRIPTORS,
    CANCEL_STOPPED,
    KILL_ZYGOTE,
    STOP,
    KILL_CLIENT,
    DISK,
    SIGNAL_CLIENT,
    USER,
    HOME,
)
IN_A_WORLD = (DISK, USER, HOME)
"""The kinds for which a client is started in surroundings of their own, which takes rights that not everybody has."""
OFTEN = (KILL_WORKER, CANCEL, SIGNAL, STOP_AND_GO, FILE, POOL)
"""The kinds with most room for chance, which each round has twice."""

START, LOAD, RUN, IDLE = "start", "load", "run", "idle"
UNLOAD, TRIM, STATUS, CLOSE = "unload", "trim", "status", "close"
REQUESTS = (UNLOAD, TRIM, STATUS, CLOSE)
PHASES = (*REQUESTS, *(START, LOAD, RUN, IDLE) * 4, *(RUN,) * 4)
"""Of which most take long enough to be hit; requests are over in milliseconds unless a worker stands still."""

LAUNCHER = -1
"""In place of a rank: the launcher."""

REPLACED, OVERWRITTEN, CUT, GONE = "replaced", "overwritten", "cut short", "deleted"
CHANGES = (REPLACED, OVERWRITTEN, CUT, GONE)

STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
OTHER_SIGNALS = tuple(sorted(set(range(1, signal.SIGRTMAX + 1)) - {9, 32, 33, *STOPPING}))
"""All but SIGKILL and those that stop a process, which are kinds of their own, and the two that the C library keeps."""
HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGPIPE, signal.SIGXFSZ}
"""What a Python process lives through."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        number: in its campaign.
        kind: one of `KINDS`.
        job: the work during which it happens.
        phase: of that work, one of `PHASES`.
        rank: of the process that it happens to, or `LAUNCHER`.
        signal: the number of the signal, of kinds that send one of many.
        moment: when in the phase, as a share of the seconds that the phase takes without a fault.
        seconds: how long what was stopped stands still, of kinds that let it go on.
        times: how often, of kinds that repeat.
        change: what happens to the file, or what else is asked for meanwhile.
    """

    number: int
    kind: str
    job: str
    phase: str
    rank: int
    signal: int
    moment: float
    seconds: float
    times: int
    change: str

    def __str__(self) -> str:
        who = "launcher" if self.rank == LAUNCHER else f"rank {self.rank}"
        more = {
            SIGNAL: f"signal {self.signal} to {who}",
            SIGNAL_CLIENT: f"signal {self.signal}",
            STOP: who,
            STOP_AND_GO: f"{who} for {self.seconds:.1f} s",
            CANCEL: f"{self.times} times",
            CANCEL_STOPPED: who,
            FILE: self.change,
            POOL: self.change,
            KILL_WORKER: who,
        }.get(self.kind, "")
        return f"{self.kind}{f' ({more})' if more else ''}: {self.job}, {self.phase}, at {self.moment:.2f}"


def draw(
    seed: int, count: int, jobs: Sequence[str], of_files: Sequence[str], kinds: Sequence[str] = KINDS
) -> Iterator[Fault]:
    """The first `count` faults of a seed; the kinds come round by round, each round in an order of its own.

    Args:
        of_files: those of the jobs that read a file.
    """
    dealt: list[str] = []
    shuffling = random.Random(f"kinds {seed}")
    for number in range(count):
        if not dealt:
            dealt = [kind for kind in kinds for _ in range(1 + (kind in OFTEN))]
            shuffling.shuffle(dealt)
        kind = dealt.pop()
        rng = random.Random(f"{seed} {number}")
        yield _drawn(rng, number, kind, rng.choice(of_files if kind == FILE else jobs), jobs)


def _drawn(rng: random.Random, number: int, kind: str, job: str, jobs: Sequence[str]) -> Fault:
    workers = 4 if job.endswith("4") else 2
    phase = rng.choice(PHASES)
    rank = rng.randrange(workers)
    if kind in (SIGNAL, STOP, STOP_AND_GO, CANCEL_STOPPED) and rng.random() < 0.25:
        rank = LAUNCHER
    if kind == KILL_ZYGOTE:
        phase = START
    elif kind in (STOP, CANCEL, CANCEL_STOPPED, POOL) and phase == IDLE:
        phase = RUN
    elif kind == FILE:
        phase = rng.choice((START, LOAD, LOAD, RUN, IDLE))
    elif kind in (DISK, USER, HOME, DESCRIPTORS):
        phase = START
    change = rng.choice(CHANGES) if kind == FILE else rng.choice((*REQUESTS, *jobs))
    return Fault(
        number,
        kind,
        job,
        phase,
        rank,
        rng.choice(OTHER_SIGNALS),
        rng.random(),
        rng.uniform(0.2, 3.0),
        rng.randint(1, 4),
        change,
    )
