"""The client whose workers get hurt, as the campaign drives it: what both a pool's program and ComfyUI can do."""

from __future__ import annotations

import abc
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from testkit.campaign import faults
from testkit.campaign.families import Family, family_of
from testkit.processes import wait_until_gone

WAIT_SECONDS = 120.0
"""For what takes a few seconds on an idle machine."""

OLD, NEW = 0, 5
"""Seeds of the weights that a job's file has, and of those that it is changed for."""

DONE, FAILED, CANCELLED, HUNG, LOST = "done", "failed", "cancelled", "hung", "lost"


@dataclass
class Call:
    """Something that a client was asked to do.

    Args:
        state: how it ended, or "" while it runs.
        text: of the error it failed with.
        digest: of the result's bytes.
        steps: times at which its forwards ended.
    """

    began: float
    state: str = ""
    text: str = ""
    digest: str = ""
    at: float = 0.0
    steps: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def end(self, state: str, text: str = "", digest: str = "", ago: float = 0.0) -> None:
        """Note how it ended, `ago` seconds before now."""
        self.state, self.text, self.digest, self.at = state, text, digest, time.monotonic() - ago
        self.over.set()

    @property
    def seconds(self) -> float:
        return self.at - self.began


@dataclass(frozen=True)
class Pace:
    """The seconds that a job takes without faults, by phase."""

    start: float
    load: float
    run: float

    def of(self, phase: str) -> float:
        return {faults.START: self.start, faults.LOAD: self.load, faults.RUN: self.run}.get(phase, 0.05)


class Client(abc.ABC):
    """One client at a time, started anew where a fault has ended it.

    Attributes:
        place: as the table names it.
        jobs: names of the work that it can do.
    """

    place: str
    jobs: tuple[str, ...]

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """Of the client's process; 0 while there is none."""

    @property
    @abc.abstractmethod
    def temp(self) -> Path:
        """The client's TMPDIR."""

    @abc.abstractmethod
    def start(self, kind: str = "") -> None:
        """Start it, in the world of a kind of fault."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End it, if it runs."""

    @abc.abstractmethod
    def begin(self, what: str) -> Call:
        """Begin a job by its name, or one of `faults.REQUESTS`."""

    @abc.abstractmethod
    def cancel(self, call: Call) -> None:
        """Give a call up, as the user's Cancel does."""

    @abc.abstractmethod
    def unload(self) -> None:
        """Let the workers forget the models, and wait until they have."""

    @abc.abstractmethod
    def file_of(self, job: str) -> Path | None:
        """The file on which the result of a job depends, and which a fault may change; None where there is none."""

    @abc.abstractmethod
    def write_file(self, job: str, path: Path, seed: int) -> None:
        """Write that file with other weights to `path`."""

    def put_file(self, job: str, seed: int) -> None:
        """Put the file of a job in place, as a whole, with the weights of `seed`."""
        file = self.file_of(job)
        assert file is not None
        other = file.with_suffix(".other")
        self.write_file(job, other, seed)
        os.replace(other, file)

    @property
    def family(self) -> Family:
        return family_of(self.pid) if self.pid else Family()

    def wait(self, call: Call, seconds: float) -> Call:
        """Wait until the call has ended; its state is "hung" after so many seconds."""
        if not call.over.wait(seconds):
            call.end(HUNG)
        return call

    def run(self, what: str, seconds: float) -> Call:
        return self.wait(self.begin(what), seconds)

    def end_pool(self) -> None:
        """End the workers, so that the next job starts others."""
        family = self.family
        if family.launcher:
            os.kill(family.launcher, signal.SIGKILL)
            wait_until_gone(family.pids, 10)

    def measure(self, job: str, seconds: float) -> tuple[Pace, str]:
        """How long the job takes, and the digest of its result, which must not depend on the phase it begins in.

        Raises:
            RuntimeError: the job fails without any fault.
        """
        self.end_pool()
        calls = [self.run(job, seconds), self.run(job, seconds)]
        self.unload()
        calls.append(self.run(job, seconds))
        if any(call.state != DONE for call in calls) or len({call.digest for call in calls}) != 1:
            raise RuntimeError(f"{job} without faults: {[(call.state, call.text, call.digest) for call in calls]}")
        cold, warm, reloaded = (call.seconds for call in calls)
        return Pace(max(cold - warm, 0.1), max(reloaded - warm, 0.05), warm), calls[0].digest
