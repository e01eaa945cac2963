"""The worker processes of one launcher: how they start, how their end is seen, and that none outlives the launcher.

GPU workers are spawned, each a clean interpreter. CPU workers are forked from a zygote, a process that imports torch
once for all of them: the import is most of what the start of a CPU worker costs. The zygote ends as soon as it has
forked the workers, and the launcher, a subreaper, becomes their parent. It thus learns how they end, and the kernel
ends them with it, as it does with spawned ones. Imports no torch itself, as the launcher needs none.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_ADOPTION_SECONDS = 0.001


@dataclass(frozen=True)
class WorkerStart:
    """What one worker is given.

    Args:
        join: a `messages.Join`, encoded.
        connection: the worker's end of the pipe to the launcher.
    """

    join: bytes
    connection: Connection


class WorkerProcess(Protocol):
    """A process as its parent sees it; multiprocessing's own processes are of this kind."""

    @property
    def pid(self) -> int | None:
        """The process id."""

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process ends."""

    @property
    def exitcode(self) -> int | None:
        """The exit status, minus the number of the signal that ended the process, or None while the process runs."""

    def kill(self) -> None:
        """End the process by SIGKILL."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process has ended, for `timeout` seconds at most."""


class AdoptedProcess:
    """A child of this process that another process forked: a `WorkerProcess`."""

    def __init__(self, pid: int):
        self.pid = pid
        self.sentinel = os.pidfd_open(pid)
        self._exitcode: int | None = None

    @property
    def exitcode(self) -> int | None:
        """See `WorkerProcess.exitcode`."""
        self._reap()
        return self._exitcode

    def kill(self) -> None:
        """See `WorkerProcess.kill`."""
        if self.exitcode is None:  # else the process id may be another's by now
            os.kill(self.pid, signal.SIGKILL)

    def join(self, timeout: float | None = None) -> None:
        """See `WorkerProcess.join`."""
        wait([self.sentinel], timeout)
        self._reap()

    def _reap(self) -> None:
        if self._exitcode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._exitcode = os.waitstatus_to_exitcode(status)


def spawn(work: WorkerStart) -> BaseProcess:
    """Start one worker in a clean interpreter."""
    process = multiprocessing.get_context("spawn").Process(target=_spawned, args=(work,), name="wan-parallel-worker")
    process.start()
    return process


class Zygote:
    """Forks a worker for each `work` after the import of torch, and ends.

    Attributes:
        process: the zygote itself; it ends with status 0 when all workers have been forked.
        pids: becomes readable when the zygote ends. (The sentinel of `process` does not: the workers inherit it.)
    """

    def __init__(self, work: Sequence[WorkerStart]):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        context = multiprocessing.get_context("spawn")
        self.pids, pids = context.Pipe(duplex=False)
        self.process = context.Process(target=_fork, args=(list(work), pids), name="wan-parallel-zygote")
        self.process.start()
        pids.close()

    def workers(self) -> list[AdoptedProcess]:
        """The workers in the order of their work; to be asked once, after the zygote has ended with status 0."""
        with self.pids:
            return [AdoptedProcess(pid) for pid in self.pids.recv()]


def can_fork() -> bool:
    """Whether this machine tells a launcher of the end of workers that a zygote forked (Linux 5.3 and later)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _spawned(work: WorkerStart) -> None:
    """Entry of a spawned worker. Imports torch there, so that the launcher does without."""
    _end_by_sigint()
    _die_with_launcher()  # first: the import takes seconds
    from ..worker.worker import main

    main(work.join, work.connection)


def _fork(work: list[WorkerStart], pids: Connection) -> None:
    """Entry of the zygote."""
    _end_by_sigint()
    _die_with_launcher()
    from ..worker import worker  # noqa: F401  # once for all workers

    gc.freeze()  # a collection in a worker would otherwise write to all pages that the workers share
    context = multiprocessing.get_context("fork")
    forked: list[BaseProcess] = []
    for own in work:
        foreign = [pids, *(other.connection for other in work if other is not own)]
        arguments = (os.getppid(), os.getpid(), foreign, own)
        process = context.Process(target=_forked, args=arguments, name="wan-parallel-worker")
        try:
            process.start()
        except OSError:  # the system starts no more processes
            log.exception("A worker cannot be forked.")
            for started in forked:
                started.kill()
            os._exit(1)  # multiprocessing would wait for the children, and these wait for this end
        forked.append(process)
    pids.send([process.pid for process in forked])
    os._exit(0)  # without waiting for its children


def _forked(launcher: int, zygote: int, foreign: list[Connection], work: WorkerStart) -> None:
    """Entry of a forked worker; `foreign` are the descriptors of others that came with the fork."""
    for connection in foreign:
        connection.close()
    while os.getppid() == zygote:
        time.sleep(_ADOPTION_SECONDS)
    if os.getppid() != launcher:
        return
    _die_with(os.pidfd_open(launcher))  # not before: the kernel would take the zygote's end for the launcher's
    from ..worker.worker import main

    main(work.join, work.connection)


def _end_by_sigint() -> None:
    """Let SIGINT end this process, and those that it forks, as other signals do: the launcher then sees which one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _die_with_launcher() -> None:
    """End this process, which the launcher spawned, when the launcher has ended."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    _die_with(launcher.sentinel)


def _die_with(parent: int) -> None:
    """End this process when its parent has ended, however the parent ended.

    Args:
        parent: a descriptor that becomes readable when the parent ends.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        wait([parent])
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
