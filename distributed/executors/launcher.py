"""The process between ComfyUI and the workers of this host: starts them, passes requests on, notices deaths.

ComfyUI must not spawn workers itself: multiprocessing would import its whole `main.py` in every child. The
launcher is a clean interpreter that holds no weights and imports no torch, so it can always answer, and when
it ends, in whatever way, the workers end with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait

from ..protocol.codec import ProtocolError
from ..protocol.messages import Cancel, Join, Message, PoolFailed, PoolReady, Ready, Start, StartFailed, decode, encode
from ..protocol.pool_errors import Failure, WorkerDied, WorkerSilent
from ..protocol.replies import Replies, Reply
from ..protocol.requests import Request
from ..protocol.silence import Silence
from ..shm.cancel import CancelMemory
from ..shm.signs import LAUNCHER, Activity, SignsTable
from .mailboxes import Outbox
from .silence_watch import NO_SIGN, Observed, SilenceWatch
from .worker_processes import WorkerProcess, WorkerStart, Zygote, can_fork, spawn

log = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0
"""After one worker's error in a collective request the others may still answer; one that does not waits for ever."""
_JOIN_SECONDS = 2.0


@dataclass
class _Pending:
    """A request that not all workers have answered yet.

    Args:
        collective: as in `Request`.
        deadline: until when they must have, in seconds of `time.monotonic`.
    """

    collective: bool
    replies: dict[int, Reply] = field(default_factory=dict)
    deadline: float = float("inf")


class _PoolEnded(Exception):
    """The pool cannot go on."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


class Launcher:
    """Serves one client until it closes its end, or until a worker is lost."""

    def __init__(self, client: Connection, start: Start):
        self.client, self.start = client, start
        self.client_end = _end_of(start.client_pid)
        self.barrier = CancelMemory(len(start.locations))
        self.pending: dict[int, _Pending] = {}
        self.processes: list[WorkerProcess] = []
        self.connections: list[Connection] = []
        self.outboxes: list[Outbox] = []
        self.signs = SignsTable.open(start.signs)
        self.pulse = self.signs.of(LAUNCHER)
        self.pulse.begin(Activity.PASSING_ON)
        self.watch = SilenceWatch(start.limits)
        self.looked = 0.0
        self.silent: set[tuple[str, str]] = set()

    def run(self) -> int:
        """Returns the exit status of the launcher."""
        try:
            self._spawn()
            self._wait_until_ready()
            while True:
                self._step()
        except _PoolEnded as end:
            log.error("%s", end)
            self._tell_client(PoolFailed(end.failure))
            return 1
        except ProtocolError as error:
            log.error("%s", error)
            self._tell_client(PoolFailed(Failure.of(error)))
            return 1
        except (EOFError, ConnectionError):  # the client has gone
            return 0
        finally:
            self._stop()

    def _spawn(self) -> None:
        store = os.memfd_create("wan-parallel-store")  # no port, and no file that would be left over
        rendezvous = f"file:///proc/{os.getpid()}/fd/{store}"
        work = []
        for rank in range(len(self.start.locations)):
            ours, theirs = multiprocessing.Pipe()
            join = Join(
                rank, self.start.settings, self.start.locations, rendezvous, self.barrier.path, self.start.signs
            )
            work.append(WorkerStart(encode(join), theirs))
            self.connections.append(ours)
            self.outboxes.append(Outbox(ours))
        if self.start.settings.device == "cpu" and can_fork():
            self._fork(work)
        else:
            self.processes.extend(spawn(one) for one in work)
        for one in work:
            one.connection.close()

    def _fork(self, work: Sequence[WorkerStart]) -> None:
        """Let a zygote start the workers. The client may go meanwhile."""
        zygote = Zygote(work)
        self.processes = [zygote.process]
        tick = self.start.limits.tick
        while zygote.pids not in (news := wait([self.client, *self.client_end, zygote.pids], tick)):
            self._hear_client(news)
            self._look([Observed(0, "The process that starts the workers", zygote.process.pid or 0, NO_SIGN)])
        zygote.process.join()
        if zygote.process.exitcode != 0:
            reason = _exit_reason("The process that starts the workers", zygote.process)
            raise _PoolEnded(Failure.of(WorkerDied(reason)))
        self.processes = [*zygote.workers()]

    def _wait_until_ready(self) -> None:
        ready: dict[int, Ready] = {}
        while len(ready) < len(self.processes):
            self._look(self._observed(rank for rank in range(len(self.processes)) if rank not in ready))
            for rank, message in self._messages():
                if isinstance(message, StartFailed):
                    failure = message.failure
                    raise _PoolEnded(replace(failure, text=f"Rank {rank} could not start: {failure.text}"))
                assert isinstance(message, Ready)
                ready[rank] = message
        self.client.send_bytes(encode(PoolReady(tuple(ready[rank] for rank in sorted(ready)))))

    def _step(self) -> None:
        unanswered = {
            rank for p in self.pending.values() for rank in range(len(self.processes)) if rank not in p.replies
        }
        self._look(self._observed(sorted(unanswered)), any(pending.collective for pending in self.pending.values()))
        for rank, reply in self._messages():
            assert isinstance(reply, Reply)
            pending = self.pending[reply.id]
            pending.replies[rank] = reply
            if len(pending.replies) == len(self.processes):
                del self.pending[reply.id]
                replies = tuple(pending.replies[rank] for rank in sorted(pending.replies))
                self.client.send_bytes(encode(Replies(reply.id, replies)))
            elif pending.collective and reply.failure is not None:
                pending.deadline = min(pending.deadline, time.monotonic() + _GRACE_SECONDS)
        for pending in self.pending.values():
            if time.monotonic() > pending.deadline:
                rank, failure = next((r, reply.failure) for r, reply in pending.replies.items() if reply.failure)
                raise _PoolEnded(replace(failure, text=f"Rank {rank} failed while the others waited: {failure.text}"))

    def _messages(self) -> list[tuple[int, Message]]:
        """Wait for news; pass the client's on to the workers and return those of the workers, with rank."""
        sentinels = [process.sentinel for process in self.processes]
        deadline = min((p.deadline for p in self.pending.values()), default=float("inf"))
        timeout = min(self.start.limits.tick, max(0.0, deadline - time.monotonic()) + 0.01)
        news = wait([self.client, *self.client_end, *self.connections, *sentinels], timeout)
        self._hear_client(news)
        messages = []
        for rank, connection in enumerate(self.connections):
            if connection in news:
                try:
                    messages.append((rank, decode(connection.recv_bytes())))
                except (EOFError, ConnectionError):
                    self.processes[rank].join(_JOIN_SECONDS)
        if not messages:
            self._check_alive()
        return messages

    def _hear_client(self, news: Sequence[object]) -> None:
        """Pass on what the client says, if `news` has it.

        Raises:
            EOFError: the client has gone.
        """
        if not set(self.client_end).isdisjoint(news):
            raise EOFError
        if self.client in news:
            self._pass_on(self.client.recv_bytes())

    def _pass_on(self, data: bytes) -> None:
        message = decode(data)
        if isinstance(message, Cancel):
            self.barrier.cancel(message.id)
            return
        assert isinstance(message, Request)
        self.pending[message.id] = _Pending(message.collective)
        for outbox in self.outboxes:
            outbox.send(data)

    def _observed(self, ranks: Iterable[int]) -> list[Observed]:
        """These ranks as they are now."""
        return [
            Observed(rank, f"Worker rank {rank}", self.processes[rank].pid or 0, self.signs.read(rank))
            for rank in ranks
        ]

    def _look(self, expected: Sequence[Observed], together: bool = True) -> None:
        """Show that this process runs, and look for signs of life of those that are expected to do something.

        Raises:
            _PoolEnded: one of them has been silent for too long.
        """
        self.pulse.beat()
        if (now := time.monotonic()) - self.looked < 0.9 * self.start.limits.tick:
            return
        self.looked = now
        silent = self.watch.look(expected, together)
        if silent and silent[0].left <= 0:
            raise _PoolEnded(Failure.of(WorkerSilent(silent[0].ended())))
        said = {(process.name, process.kind) for process in silent}
        if said != self.silent:
            self.silent = said
            self.client.send_bytes(encode(Silence(silent)))

    def _check_alive(self) -> None:
        dead = [rank for rank, process in enumerate(self.processes) if process.exitcode is not None]
        if dead:
            reasons = (_exit_reason(f"Worker rank {rank}", self.processes[rank]) for rank in dead)
            raise _PoolEnded(Failure.of(WorkerDied(" ".join(reasons))))

    def _tell_client(self, message: PoolFailed) -> None:
        try:
            self.client.send_bytes(encode(message))
        except ConnectionError:
            log.warning("The client had gone before it could be told.")

    def _stop(self) -> None:
        """End the workers at once: they hold nothing that must be saved."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(_JOIN_SECONDS)


def _exit_reason(title: str, process: WorkerProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system does that when host memory runs out)" if -code == signal.SIGKILL else ""
        return f"{title} (pid {process.pid}) was ended by {name}{hint}."
    return f"{title} (pid {process.pid}) ended with status {code}; its last words are in the console."


def _end_of(pid: int) -> list[int]:
    """A descriptor that becomes readable when the process ends; none before Linux 5.3.

    The connection alone does not tell: a process that the client forked holds the client's end open as well.
    """
    try:
        return [os.pidfd_open(pid)]
    except OSError:
        return []


def main(descriptor: str) -> int:
    """Entry of the launcher process; `descriptor` is its end of the client's socket pair."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="[WanParallel] %(message)s")
    # Nothing of one host's pool needs a network: gloo and NCCL would otherwise listen on the first interface.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    client = Connection(int(descriptor))
    try:
        start = decode(client.recv_bytes())
    except EOFError:
        return 0
    assert isinstance(start, Start)
    return Launcher(client, start).run()
