"""What is done for each kind of fault, and what must come of it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from testkit.campaign import clients, faults
from testkit.campaign.clients import Call, Client, Pace
from testkit.campaign.faults import LAUNCHER, Fault
from testkit.campaign.worlds import filled
from testkit.processes import alive, wait_until_gone

RUN_SECONDS = clients.WAIT_SECONDS
"""After which a job counts as hung."""
TOLD_SECONDS = 10.0
"""Within which the death of a process must have been told, and the others must have ended."""
CLIENT_SECONDS = 20.0
"""Within which a client must end that a signal asks to; Python and ComfyUI tidy up first."""
CANCEL_SECONDS = 3.0
"""Within which Cancel gives the client back; one on an idle machine."""
SILENCE_LIMIT = 24.0
"""The limit (`silence.VARIABLE`) that clients are given: a stopped process ends the pool after a third of it."""
SILENCE_SECONDS = SILENCE_LIMIT / 3 + TOLD_SECONDS
"""Within which a process that stands still must have been told and the pool ended."""
TRIES = 4
"""How often a job is begun, at the most, that is over before the fault can happen."""
DESCRIPTORS = 40
"""The most that a client may open beyond those it has, where they are few."""

_NAMED_SILENCE = r"stopped|silent|no sign of life|SIGSTOP"
_NAMED_FILE = r"tiny|\bfile\b|deserializ|not in list"
_NAMED_DESCRIPTORS = r"open files|descriptor|ulimit"


@dataclass
class Verdict:
    """What came of a fault.

    Args:
        place: of the client.
        told: what the client said, where something failed.
        seconds: from the fault to the end of what it hit.
        short: what was not as it must be; nothing where all was.
        hung: whether something did not end.
    """

    fault: Fault
    place: str = ""
    told: str = ""
    seconds: float = 0.0
    short: list[str] = field(default_factory=list)
    hung: bool = False
    left: bool = False
    unnamed: bool = False
    unequal: bool = False

    def hang(self, what: str) -> None:
        self.hung = True
        self.short.append(f"{what} did not end")

    def leave(self, what: str) -> None:
        self.left = True
        self.short.append(f"left over: {what}")

    def misname(self, text: str, wanted: str) -> None:
        self.unnamed = True
        self.short.append(f"the message {text!r} does not match {wanted!r}")

    def differ(self, what: str) -> None:
        self.unequal = True
        self.short.append(f"{what} is not bit-equal")


@dataclass
class Scene:
    """A fault with what it happens to.

    Args:
        digests: of results, by job and by the seed of the model's weights.
    """

    client: Client
    fault: Fault
    pace: Pace
    digests: dict[tuple[str, int], str]
    verdict: Verdict

    @property
    def request(self) -> str:
        """What the client is asked for in the phase of the fault."""
        return self.fault.phase if self.fault.phase in faults.REQUESTS else self.fault.job

    def begin(self) -> Call:
        """Bring the client to the phase and begin it."""
        if self.fault.phase == faults.START:
            self.client.end_pool()
        elif self.fault.phase == faults.LOAD:
            self.client.unload()
        return self.client.begin(self.request)

    def at_moment(self) -> Call:
        """Begin the phase and wait until the moment of the fault; once more and less long if all was over before."""
        seconds = self.fault.moment * self.pace.of(self.fault.phase)
        for _ in range(TRIES):
            call = self.begin()
            call.over.wait(seconds)
            if call.state != clients.DONE or self.fault.phase in faults.REQUESTS:
                break
            self.must_be_right(call)
            seconds /= 2
        return call

    def wait(self, call: Call, seconds: float, since: float) -> Call:
        """Wait for a call, and note how long it took since the fault, what it said, and whether it hung."""
        self.client.wait(call, seconds)
        self.verdict.seconds = max(self.verdict.seconds, call.at - since)
        self.verdict.told = self.verdict.told or call.text
        if call.state == clients.HUNG:
            self.verdict.hang(self.request)
        return call

    def must_be_right(self, call: Call, job: str | None = None, seeds: tuple[int, ...] = (clients.OLD,)) -> None:
        """The call must have ended as without a fault; requests have no result."""
        job = job or self.request
        if call.state == clients.LOST:
            self.verdict.short.append(f"the client ended during {job}")
        elif call.state == clients.FAILED:
            self.verdict.short.append(f"{job} failed: {call.text}")
        elif call.state == clients.DONE and call.digest not in self._right(job, seeds):
            self.verdict.differ(f"the result of {job}")

    def _right(self, job: str, seeds: tuple[int, ...]) -> set[str]:
        return {""} if job in faults.REQUESTS else {self.digests[job, seed] for seed in seeds}

    def must_be_named(self, call: Call, wanted: str, job: str | None = None) -> None:
        """Where the call failed, its message must match; where it was done before the fault, it must be right."""
        if call.state == clients.FAILED and not re.search(wanted, call.text, re.IGNORECASE):
            self.verdict.misname(call.text, wanted)
        elif call.state != clients.FAILED:
            self.must_be_right(call, job)

    def victim(self, call: Call) -> int:
        """The process of the fault, as soon as there is one; 0 where the call ended before."""
        while not call.over.is_set():
            family = self.client.family
            if self.fault.kind == faults.KILL_ZYGOTE:
                found = family.zygote
            elif self.fault.rank == LAUNCHER or self.fault.kind == faults.KILL_LAUNCHER:
                found = family.launcher
            else:
                found = family.workers[self.fault.rank] if self.fault.rank < len(family.workers) else 0
            if found:
                return found
            call.over.wait(0.01)
        return 0


def end_by_signal(scene: Scene) -> None:
    """A signal, SIGKILL or another one, to a process of the pool; at rest, a job begins right after it."""
    fault, client, verdict = scene.fault, scene.client, scene.verdict
    number = fault.signal if fault.kind == faults.SIGNAL else signal.SIGKILL
    call = Call(time.monotonic()) if fault.phase == faults.IDLE else scene.at_moment()
    victim = scene.victim(call)
    family, struck = client.family.pids, time.monotonic()
    if victim:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, number)
    job = scene.request
    if fault.phase == faults.IDLE or call.state == clients.DONE:  # nothing is under way
        scene.must_be_right(call)
        call, job = client.begin(fault.job), fault.job
    scene.wait(call, RUN_SECONDS, struck)
    scene.must_be_named(call, _named_end(fault, victim, number), job)
    ended = call.state == clients.FAILED or (number == signal.SIGKILL and victim)
    if call.state == clients.FAILED and verdict.seconds > TOLD_SECONDS:
        verdict.short.append(f"told after {verdict.seconds:.1f} s")
    if ended and (left := wait_until_gone(family, TOLD_SECONDS)):
        verdict.leave(f"processes {sorted(left)} of the pool")


def _named_end(fault: Fault, victim: int, number: int) -> str:
    names = {int(known): known.name for known in signal.Signals}
    how = names.get(number, rf"(SIGRT\w*|signal {number}\b)")
    if fault.kind == faults.KILL_ZYGOTE:
        who = "starts the workers"
    else:
        launcher = fault.rank == LAUNCHER or fault.kind == faults.KILL_LAUNCHER
        who = "launcher" if launcher else rf"rank {fault.rank}"
    return rf"{who} \(pid {victim}\).* {how}"


def end_client(scene: Scene) -> None:
    """A signal to the client, with which its workers must go where it goes."""
    fault, client, verdict = scene.fault, scene.client, scene.verdict
    number = fault.signal if fault.kind == faults.SIGNAL_CLIENT else signal.SIGKILL
    call = Call(time.monotonic()) if fault.phase == faults.IDLE else scene.at_moment()
    pid, family, struck = client.pid, client.family.pids, time.monotonic()
    os.kill(pid, number)
    if number in faults.HARMLESS:
        if fault.phase != faults.IDLE:
            scene.must_be_right(scene.wait(call, RUN_SECONDS, struck))
        return
    while client.pid and time.monotonic() - struck < CLIENT_SECONDS:
        time.sleep(0.02)
    if client.pid:
        verdict.hang("the client")
        return
    verdict.seconds = time.monotonic() - struck
    if left := wait_until_gone(family, TOLD_SECONDS):
        verdict.leave(f"processes {sorted(left)} of the pool")
    if leftovers := sorted(path.name for path in client.temp.iterdir()):
        verdict.leave(f"{leftovers} in TMPDIR")
    for path in client.temp.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _beside_stopped(scene: Scene) -> Iterator[tuple[Call, int]]:
    """A call with its process of the fault, which stands still in the block.

    It stops at the moment of the fault, or before the call where the call would be over in milliseconds.
    """
    first = scene.fault.phase in (faults.IDLE, *faults.REQUESTS)
    call = Call(time.monotonic()) if first else scene.at_moment()
    victim = scene.victim(call)
    try:
        if victim:
            os.kill(victim, signal.SIGSTOP)
        if first:
            call = scene.begin()
        yield call, victim
    finally:
        if victim and alive(victim):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGCONT)


def stop_for_good(scene: Scene) -> None:
    """A process stands still and never goes on."""
    with _beside_stopped(scene) as (call, victim):
        before = scene.client.family.pids
        scene.wait(call, SILENCE_SECONDS, time.monotonic())
        who = "launcher" if scene.fault.rank == LAUNCHER else rf"rank {scene.fault.rank}"
        scene.must_be_named(call, rf"{who} \(pid {victim}\).*({_NAMED_SILENCE})")
        if call.state == clients.FAILED and (left := wait_until_gone(before | {victim}, TOLD_SECONDS)):
            scene.verdict.leave(f"processes {sorted(left)} of the pool")


def stop_and_go(scene: Scene) -> None:
    """A process stands still for a while."""
    with _beside_stopped(scene) as (call, _):
        struck = time.monotonic()
        call.over.wait(scene.fault.seconds)
    scene.must_be_right(scene.wait(call, RUN_SECONDS, struck))


def cancel(scene: Scene) -> None:
    """Cancel, again and again; the workers stay."""
    launcher = 0
    for _ in range(scene.fault.times):
        call = scene.at_moment()
        _give_up(scene, call)
        family = scene.client.family
        if launcher and family.launcher != launcher and scene.fault.phase not in (faults.START, faults.CLOSE):
            scene.verdict.short.append("Cancel has ended the pool")
        launcher = family.launcher


def cancel_beside_stopped(scene: Scene) -> None:
    """Cancel of what waits for a process that stands still, which goes on afterwards."""
    with _beside_stopped(scene) as (call, _):
        call.over.wait(0.3)
        _give_up(scene, call)


def _give_up(scene: Scene, call: Call) -> None:
    struck = time.monotonic()
    scene.client.cancel(call)
    scene.wait(call, RUN_SECONDS, struck)
    if call.state == clients.CANCELLED and call.at - struck > CANCEL_SECONDS:
        scene.verdict.short.append(f"Cancel took {call.at - struck:.1f} s")
    scene.must_be_right(call)


def change_file(scene: Scene) -> None:
    """The job's file becomes another one, at rest or while it is read or used; then it is the old one again."""
    fault, client = scene.fault, scene.client
    path = client.file_of(fault.job)
    assert path is not None  # faults are drawn so
    other = path.with_suffix(".other")
    client.write_file(fault.job, other, clients.NEW)
    try:
        if fault.phase == faults.IDLE:
            _change(path, other, fault.change)
        else:
            call = scene.at_moment()
            struck = time.monotonic()
            _change(path, other, fault.change)
            scene.wait(call, RUN_SECONDS, struck)
            if call.state == clients.FAILED:
                scene.must_be_named(call, _NAMED_FILE)
            else:
                scene.must_be_right(call, seeds=(clients.OLD, clients.NEW))
        again = client.run(fault.job, RUN_SECONDS)
        if again.state == clients.HUNG:
            scene.verdict.hang("the run with the other file")
        elif fault.change in (faults.REPLACED, faults.OVERWRITTEN):
            scene.must_be_right(again, fault.job, (clients.NEW,))
        elif again.state == clients.DONE:
            scene.verdict.short.append(f"a file that is {fault.change} was taken")
        else:
            scene.must_be_named(again, _NAMED_FILE)
            scene.verdict.told = scene.verdict.told or again.text
    finally:
        client.put_file(fault.job, clients.OLD)


def _change(path: Path, other: Path, how: str) -> None:
    if how == faults.REPLACED:
        os.replace(other, path)
    elif how == faults.OVERWRITTEN:
        with path.open("r+b") as file:
            file.write(other.read_bytes())
    elif how == faults.CUT:
        cut = path.with_suffix(".cut")
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        os.replace(cut, path)
    else:
        path.unlink()


def ask_for_more(scene: Scene) -> None:
    """Something else is asked for while a job runs: other settings, or a request. Both must come out right."""
    fault, client = scene.fault, scene.client
    call = scene.at_moment()
    struck = time.monotonic()
    more = client.begin(fault.change)
    scene.wait(call, RUN_SECONDS, struck)
    scene.must_be_right(call)
    if client.wait(more, RUN_SECONDS).state == clients.HUNG:
        scene.verdict.hang(fault.change)
    scene.must_be_right(more, fault.change)


def in_another_world(scene: Scene) -> None:
    """A client as another user, with a home or disks that are full; with half of the faults a worker is killed too."""
    fault, client, verdict = scene.fault, scene.client, scene.verdict
    client.stop()
    client.start(fault.kind)
    with filled(client.pid, client.temp) if fault.kind == faults.DISK else contextlib.nullcontext():
        call = client.run(fault.job, RUN_SECONDS)
        verdict.told = call.text
        if call.state == clients.HUNG:
            verdict.hang(fault.job)
        scene.must_be_right(call, fault.job)
        if fault.moment < 0.5 and call.state == clients.DONE:
            call = client.begin(fault.job)
            call.over.wait(fault.moment * scene.pace.run)
            victim, struck = scene.victim(call), time.monotonic()
            if victim:
                os.kill(victim, signal.SIGKILL)
            scene.wait(call, RUN_SECONDS, struck)
            if call.state == clients.FAILED:
                scene.must_be_named(call, _named_end(fault, victim, signal.SIGKILL))
            again = client.run(fault.job, RUN_SECONDS)
            scene.must_be_right(again, fault.job)
    client.stop()
    client.start()


def few_descriptors(scene: Scene) -> None:
    """The client and its workers may open few files; afterwards as many as before."""
    fault, client = scene.fault, scene.client
    client.end_pool()
    client.run(faults.CLOSE, RUN_SECONDS)
    now = max(int(name) for name in os.listdir(f"/proc/{client.pid}/fd")) + 1
    before = resource.prlimit(client.pid, resource.RLIMIT_NOFILE)
    limit = now + int(fault.moment * DESCRIPTORS)
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        call = client.begin(fault.job)
        scene.wait(call, RUN_SECONDS, call.began)
    finally:
        resource.prlimit(client.pid, resource.RLIMIT_NOFILE, before)
    scene.must_be_named(call, _NAMED_DESCRIPTORS)
    client.end_pool()  # whose processes still have the limit


DRILLS: dict[str, Callable[[Scene], None]] = {
    faults.KILL_WORKER: end_by_signal,
    faults.KILL_LAUNCHER: end_by_signal,
    faults.KILL_ZYGOTE: end_by_signal,
    faults.SIGNAL: end_by_signal,
    faults.KILL_CLIENT: end_client,
    faults.SIGNAL_CLIENT: end_client,
    faults.STOP: stop_for_good,
    faults.STOP_AND_GO: stop_and_go,
    faults.CANCEL: cancel,
    faults.CANCEL_STOPPED: cancel_beside_stopped,
    faults.FILE: change_file,
    faults.POOL: ask_for_more,
    faults.DISK: in_another_world,
    faults.USER: in_another_world,
    faults.HOME: in_another_world,
    faults.DESCRIPTORS: few_descriptors,
}
