"""The executor of one machine: a launcher beside ComfyUI, which starts one worker for each GPU of this host."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..plan.degrees import PlanError
from ..protocol.messages import Cancel, Message, PoolFailed, PoolReady, Start, decode, encode
from ..protocol.pool_errors import Failure, PoolError, WorkerDied, WorkerSilent
from ..protocol.requests import Request
from ..protocol.silence import Silence, SilenceLimits
from ..protocol.specs import PoolSettings, RankLocation, on_one_host
from ..shm.arena import Arena
from ..shm.signs import LAUNCHER, SignsTable
from . import exits
from .console import Console
from .executor import Executor, RanksEnded
from .gpu_choice import check_no_gpus, chosen_gpus
from .mailboxes import Inbox, Outbox
from .silence_watch import Observed, SilenceWatch

MAX_GPUS = 8
"""What one machine has at most, and what was tried."""

_CLOSE_SECONDS = 3.0
_LAST_WORDS_SECONDS = 1.0
"""How long to wait for what processes that end still say."""
_UNREAD_SECONDS = 0.2
_BOOTSTRAP = Path(__file__).resolve().parents[2] / "bootstrap.py"


def check_num_gpus(num_gpus: int) -> None:
    """Check that one machine can have so many GPUs.

    Raises:
        PlanError: it cannot.
    """
    if not 1 <= num_gpus <= MAX_GPUS:
        raise PlanError(f"num_gpus is {num_gpus}. Choose 1 to {MAX_GPUS}.")


def worker_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The environment of a launcher and its workers.

    ComfyUI puts its choice of torch's allocator (cudaMallocAsync) into its own; where weights live is counted in the
    segments of torch's native one (see device_memory.py).
    """
    # multiprocessing starts workers with `python -c`, which looks for modules in the working directory
    environment = {**ours, "PYTHONSAFEPATH": "1"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        kept = [option for option in environment.pop(name, "").split(",") if "cudaMallocAsync" not in option]
        if any(kept):
            environment[name] = ",".join(kept)
    return environment


class _Launcher:
    """One start of the launcher, and our end of the line to it."""

    def __init__(self, settings: PoolSettings, locations: tuple[RankLocation, ...], limits: SilenceLimits):
        self._watch = SilenceWatch(limits)
        self._starting, self._silent = True, False
        with contextlib.ExitStack() as undo:
            self._signs = SignsTable.create(len(locations))
            undo.callback(self._signs.close)
            self._console = Console()
            try:
                self._socket, theirs = socket.socketpair()
                undo.callback(self._socket.close)
                with theirs:
                    self.process = subprocess.Popen(
                        [sys.executable, str(_BOOTSTRAP), "distributed.executors.launcher", str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        env=worker_environment(os.environ),
                        stdin=subprocess.DEVNULL,
                        stderr=self._console.descriptor,
                        start_new_session=True,  # Ctrl-C in the console is for ComfyUI; the pool ends with it
                    )
            finally:
                self._console.given()
            undo.callback(self.process.wait)
            undo.callback(self._kill)
            self._connection = Connection(os.dup(self._socket.fileno()))
            undo.callback(self._connection.close)
            self._inbox, self._outbox = Inbox(self._connection), Outbox(self._connection)
            undo.pop_all()
        self._outbox.send(encode(Start(settings, locations, os.getpid(), self._signs.path, limits)))

    def send(self, message: Message | Request[Any]) -> None:
        """Send a message, without waiting until the launcher reads it. `receive` tells whether the launcher has ended,
        and first the reason that the launcher may have sent."""
        self._outbox.send(encode(message))

    def receive(self, seconds: float) -> Message | None:
        """The launcher's next message, or what is to be said of its silence; None where neither came in time.

        Raises:
            RanksEnded: the launcher has ended, or has been silent for too long.
        """
        if (message := self._inbox.receive(seconds)) is not None:
            return decode(message)
        launcher = Observed(LAUNCHER, "The pool's launcher", self.process.pid, self._signs.read(LAUNCHER))
        silent = self._watch.look([launcher])
        if silent and silent[0].left <= 0:
            self._kill()
            raise RanksEnded(Failure.of(WorkerSilent(silent[0].ended())))
        if bool(silent) == self._silent:
            return None
        self._silent = bool(silent)
        return Silence(silent)

    def stop(self) -> None:
        """Hang up; the launcher then ends its workers and itself."""
        if not self._outbox.close(_UNREAD_SECONDS):
            self._kill()  # it reads nothing, and would not see that we hang up
        with contextlib.suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)  # closing does not end a read that is under way
        self._outbox.close(_CLOSE_SECONDS)
        self._inbox.close(_CLOSE_SECONDS)
        self._connection.close()  # after both threads: its number is then another file's
        self._socket.close()
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        self._signs.close()  # likewise: a process that is still starting opens the signs by their number

    def _kill(self) -> None:
        """End the launcher and all that it has started, even what was stopped before it could say how to end."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group is its own, as its session is

    def ended(self) -> RanksEnded:
        """The error that the launcher's end is."""
        try:
            code = self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            death = WorkerDied(f"The pool's launcher (pid {self.process.pid}) closed its connection.")
        else:
            death = exits.death_of("The pool's launcher", self.process.pid, code)
        return self.failed(Failure.of(death))

    def failed(self, failure: Failure) -> RanksEnded:
        """The error that a failure of the whole pool is, with the cause that the processes have named."""
        crashed = exits.Crashed.__name__ in failure.kinds
        said = self._console.last_lines(_LAST_WORDS_SECONDS if crashed else 0)
        return RanksEnded(exits.with_cause(failure, said, self._starting))

    def note_start(self) -> None:
        """Note that all ranks have started."""
        self._starting = False


class LocalExecutor(Executor):
    """Ranks on the GPUs of this machine, or on its CPU.

    Messages go through the launcher (see launcher.py), and tensors through memory that all ranks map.
    """

    def __init__(self) -> None:
        self._launcher: _Launcher | None = None

    @property
    def alive(self) -> bool:
        """See `Executor`."""
        launcher = self._launcher  # another thread may stop it meanwhile
        return launcher is not None and launcher.process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the launcher; 0 while there is none."""
        launcher = self._launcher
        return launcher.process.pid if launcher is not None else 0

    def resolve(self, settings: PoolSettings) -> PoolSettings:
        """See `Executor`."""
        num_gpus, device = settings.plan.num_gpus, settings.device
        check_num_gpus(num_gpus)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            check_no_gpus(settings.gpus)
            return replace(settings, device=device)
        chosen = chosen_gpus(settings.gpus, num_gpus)
        first = chosen == tuple(range(num_gpus))  # settings that mean the same are one pool
        return replace(settings, device=device, gpus=() if first else tuple(map(str, chosen)))

    def locations(self, settings: PoolSettings) -> tuple[RankLocation, ...]:
        """See `Executor`."""
        return on_one_host(settings.plan.num_gpus, settings.gpu_indices)

    def start(self, settings: PoolSettings) -> None:
        """See `Executor`."""
        if not hasattr(os, "memfd_create"):
            raise PoolError("WanParallel's workers need Linux. On Windows, run ComfyUI inside WSL2.")
        limits = SilenceLimits.from_environment(os.environ)
        try:
            self._launcher = _Launcher(settings, self.locations(settings), limits)
        except (OSError, RuntimeError) as error:  # no file, process or thread more (threads: RuntimeError)
            raise exits.refused(error) from error

    def send(self, message: Request[Any] | Cancel) -> None:
        """See `Executor`."""
        self._running().send(message)

    def receive(self, seconds: float) -> Message | None:
        """See `Executor`."""
        launcher = self._running()
        try:
            message = launcher.receive(seconds)
        except (EOFError, ConnectionError):
            raise launcher.ended() from None
        if isinstance(message, PoolFailed):
            raise launcher.failed(message.failure)
        if isinstance(message, PoolReady):
            launcher.note_start()
        return message

    def stop(self) -> None:
        """See `Executor`."""
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.stop()

    def make_arena(self, nbytes: int, pinned: bool = False) -> Arena:
        """See `Executor`."""
        return Arena(nbytes, pinned)

    def _running(self) -> _Launcher:
        if self._launcher is None:
            raise RanksEnded(Failure.of(WorkerDied("The pool has not been started.")))
        return self._launcher
