"""A campaign: faults one after the other on one client, and what must hold after each of them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from wan_parallel.distributed.protocol.silence import VARIABLE

from testkit.campaign import clients, faults
from testkit.campaign.clients import Client, Pace
from testkit.campaign.drills import DRILLS, RUN_SECONDS, SILENCE_LIMIT, Scene, Verdict
from testkit.campaign.families import Held, held_by, in_shared_memory, left_over, shared_files
from testkit.campaign.faults import Fault

GROWTH_BYTES = 48 * 2**20
"""By which a client's memory may differ from what it was after its first faults, for the allocator's sake."""
GROWN_DESCRIPTORS = 2
SETTLE_SECONDS = 5.0


@dataclass
class Life:
    """What one client process held at rest: after its first faults, and after the last."""

    first: dict[str, Held] = field(default_factory=dict)
    last: dict[str, Held] = field(default_factory=dict)


class Campaign:
    """Faults on one client.

    Args:
        mark: of the client's processes (see `families.MARK`).
    """

    def __init__(self, client: Client, mark: str):
        self.client, self.mark = client, mark
        self.paces: dict[str, Pace] = {}
        self.digests: dict[tuple[str, int], str] = {}
        self.lives: dict[int, Life] = {}
        self._ready = ""  # the job that the workers did last, if they are up

    def run(self, drawn: Iterable[Fault], tell: Callable[[Verdict], object]) -> list[Verdict]:
        """Let the faults happen; each verdict is told as soon as it is there."""
        verdicts = []
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(SILENCE_LIMIT)
        self.client.start()
        try:
            for fault in drawn:
                verdicts.append(self._happen(fault))
                tell(verdicts[-1])
        finally:
            self.client.stop()
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
        return verdicts

    @property
    def growth(self) -> tuple[int, int]:
        """Bytes and descriptors by which a client has grown at the most, from its first fault in a job to the last."""
        pairs = [(life.first[job], life.last[job]) for life in self.lives.values() for job in life.first]
        grown = [(last.nbytes - first.nbytes, last.descriptors - first.descriptors) for first, last in pairs]
        return max((nbytes for nbytes, _ in grown), default=0), max((count for _, count in grown), default=0)

    def _happen(self, fault: Fault) -> Verdict:
        for job in {fault.job, *({fault.change} & set(self.client.jobs) if fault.kind == faults.POOL else ())}:
            self._know(job, changed=fault.kind == faults.FILE)
        verdict = Verdict(fault, self.client.place)
        shared, files = in_shared_memory(), set(os.listdir(self.client.temp))
        if self._ready != fault.job and self.client.run(fault.job, RUN_SECONDS).state != clients.DONE:
            raise RuntimeError(f"{fault.job} fails before the fault {fault.number}.")
        DRILLS[fault.kind](Scene(self.client, fault, self.paces[fault.job], self.digests, verdict))
        if verdict.hung:
            self._begin_anew()
        self._check_next(verdict)
        self._check_leftovers(verdict, shared, files)
        self._check_growth(verdict)
        return verdict

    def _know(self, job: str, changed: bool) -> None:
        """Measure a job and note its result, with the model's weights changed too where they will be."""
        if (job, clients.OLD) not in self.digests:
            self.paces[job], self.digests[job, clients.OLD] = self.client.measure(job, RUN_SECONDS)
            self._ready = job
        if changed and (job, clients.NEW) not in self.digests:
            self.client.put_file(job, clients.NEW)
            call = self.client.run(job, RUN_SECONDS)
            self.client.put_file(job, clients.OLD)
            if call.state != clients.DONE or call.digest == self.digests[job, clients.OLD]:
                raise RuntimeError(f"{job} with another file, without faults: {call.state} {call.text}")
            self.digests[job, clients.NEW] = call.digest
            self._ready = ""

    def _check_next(self, verdict: Verdict) -> None:
        """The next result, of the same client or of a new one, must be bit-equal."""
        if not self.client.pid:
            self.client.start()
        job = verdict.fault.job
        call = self.client.run(job, RUN_SECONDS)
        self._ready = job if call.state == clients.DONE else ""
        if call.state == clients.HUNG:
            verdict.hang("the next run")
            self._begin_anew()
        elif call.state != clients.DONE:
            verdict.short.append(f"the next run {call.state}: {call.text}")
            self._begin_anew()
        elif call.digest != self.digests[job, clients.OLD]:
            verdict.differ("the next result")

    def _begin_anew(self) -> None:
        """End what hangs, and start another client."""
        for pid in self.client.family.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.client.stop()
        self.client.start()

    def _check_leftovers(self, verdict: Verdict, shared: set[str], files: set[str]) -> None:
        if left := left_over(self.mark, self.client.pid, SETTLE_SECONDS):
            verdict.leave(f"processes {sorted(left)}")
        if names := shared_files(shared):
            verdict.leave(f"{sorted(names)} in /dev/shm")
        if names := set(os.listdir(self.client.temp)) - files:
            verdict.leave(f"{sorted(names)} in TMPDIR")

    def _check_growth(self, verdict: Verdict) -> None:
        job, now = verdict.fault.job, held_by(self.client.pid)
        life = self.lives.setdefault(self.client.pid, Life())
        first = life.first.setdefault(job, now)
        life.last[job] = now
        if now.descriptors > first.descriptors + GROWN_DESCRIPTORS:
            verdict.short.append(f"the client has {now.descriptors} descriptors open, {first.descriptors} before")
        if now.nbytes > first.nbytes + GROWTH_BYTES:
            verdict.short.append(f"the client has {now.nbytes >> 20} MiB, {first.nbytes >> 20} before")
