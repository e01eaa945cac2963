"""The process between ComfyUI and the workers: starts them, passes requests on, notices deaths.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from ..protocol.messages import Cancel, PoolFailed, PoolReady, Ready, Replies, Reply, Start, decode, encode
from ..shm.cancel import GateMemory
from .worker_processes import Arguments, WorkerProcess, Zygote, can_fork, spawn

log = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0
"""After one worker's error the others may still answer; one that does not waits in a collective for ever."""
_JOIN_SECONDS = 2.0


@dataclass
class _Pending:
    replies: dict[int, Reply] = field(default_factory=dict)
    deadline: float = float("inf")


class _PoolEnded(Exception):
    """The pool cannot go on; the text is for the user."""

    def __init__(self, reason: str, kind: str = ""):
        super().__init__(reason)
        self.kind = kind


class Launcher:
    """Serves one client until it closes its end, or until a worker is lost."""

    def __init__(self, client: Connection, start: bytes):
        message = decode(start)
        assert isinstance(message, Start)
        self.client, self.start, self.settings = client, start, message.settings
        self.client_end = _end_of(message.client_pid)
        self.gate = GateMemory()
        self.pending: dict[int, _Pending] = {}
        self.processes: list[WorkerProcess] = []
        self.connections: list[Connection] = []

    def run(self) -> int:
        """Returns the exit status of the launcher."""
        try:
            self._spawn()
            self._wait_until_ready()
            while True:
                self._step()
        except _PoolEnded as end:
            log.error("%s", end)
            self._tell_client(PoolFailed(str(end), end.kind))
            return 1
        except (EOFError, ConnectionError):  # the client has gone
            return 0
        finally:
            self._stop()

    def _spawn(self) -> None:
        store = os.memfd_create("wan-parallel-store")  # rendezvous of torch.distributed: no port, no file
        path = f"/proc/{os.getpid()}/fd/{store}"
        pipes = [multiprocessing.Pipe() for _ in range(self.settings.plan.num_gpus)]
        self.connections = [ours for ours, _ in pipes]
        work: list[Arguments] = [
            (rank, self.start, theirs, path, self.gate.path) for rank, (_, theirs) in enumerate(pipes)
        ]
        if self.settings.device == "cpu" and can_fork():
            self._fork(work)
        else:
            self.processes.extend(spawn(arguments) for arguments in work)
        for _, theirs in pipes:
            theirs.close()

    def _fork(self, work: list[Arguments]) -> None:
        """Let a zygote start the workers. The client may go meanwhile."""
        zygote = Zygote(work)
        self.processes = [zygote.process]
        while zygote.pids not in (news := wait([self.client, *self.client_end, zygote.pids])):
            self._hear_client(news)
        zygote.process.join()
        if zygote.process.exitcode != 0:
            raise _PoolEnded(_epitaph("The process that starts the workers", zygote.process))
        self.processes = [*zygote.workers()]

    def _wait_until_ready(self) -> None:
        ready: dict[int, Ready] = {}
        while len(ready) < len(self.processes):
            for rank, message in self._messages():
                if isinstance(message, Reply):
                    raise _PoolEnded(f"Rank {rank} could not start: {message.error}", message.kind)
                ready[rank] = message
        self.client.send_bytes(encode(PoolReady(tuple(ready[rank] for rank in sorted(ready)))))

    def _step(self) -> None:
        for rank, reply in self._messages():
            pending = self.pending[reply.id]
            pending.replies[rank] = reply
            if len(pending.replies) == len(self.processes):
                del self.pending[reply.id]
                replies = tuple(pending.replies[rank] for rank in sorted(pending.replies))
                self.client.send_bytes(encode(Replies(reply.id, replies)))
            elif reply.error:
                pending.deadline = min(pending.deadline, time.monotonic() + _GRACE_SECONDS)
        for pending in self.pending.values():
            if time.monotonic() > pending.deadline:
                failed = next(reply for reply in pending.replies.values() if reply.error)
                raise _PoolEnded(f"Rank {failed.rank} failed while the others waited: {failed.error}", failed.kind)

    def _messages(self) -> list[tuple[int, Ready | Reply]]:
        """Wait for news; pass the client's on to the workers and return those of the workers, with rank."""
        sentinels = [process.sentinel for process in self.processes]
        deadline = min((p.deadline for p in self.pending.values()), default=float("inf"))
        timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic()) + 0.01
        news = wait([self.client, *self.client_end, *self.connections, *sentinels], timeout)
        self._hear_client(news)
        messages: list[tuple[int, Ready | Reply]] = []
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
            self.gate.cancel(message.id)
            return
        self.pending[message.id] = _Pending()
        for connection in self.connections:
            try:
                connection.send_bytes(data)
            except ConnectionError:
                self._check_alive()

    def _check_alive(self) -> None:
        dead = [rank for rank, process in enumerate(self.processes) if process.exitcode is not None]
        if dead:
            raise _PoolEnded(" ".join(_epitaph(f"Worker rank {rank}", self.processes[rank]) for rank in dead))

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


def _epitaph(title: str, process: WorkerProcess) -> str:
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
        start = client.recv_bytes()
    except EOFError:
        return 0
    return Launcher(client, start).run()
