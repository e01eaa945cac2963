"""What the client and its workers say to each other: start them, ask, wait for all answers, give up, notice their end.

One request is under way at a time. Whoever waits is called back ten times a second and may raise to give the request
up (ComfyUI's Cancel). The workers are then told, and go on until they see it (see cancel.py). Two things follow:

- they may still read and write the memory that they were shown, so `drain` waits for their answer before it is used;
- some ranks may have left a forward that others finished, so `tidy` lets all drop what they had sent each other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from ..executors.local import PoolProcesses
from ..protocol.codec import ProtocolError
from ..protocol.errors import Failure
from ..protocol.messages import Cancel, PoolFailed, PoolReady, Ready, decode, encode
from ..protocol.replies import GivenUp, Replies, Reply
from ..protocol.reports import HeldWeights
from ..protocol.requests import Request, Trim
from ..protocol.specs import ModelSpec, PoolSettings
from ..shm.arena import Arena
from .errors import PoolError, WorkerDied, end_of_pool, error_among

log = logging.getLogger(__name__)

Poll = Callable[[], None]
"""Called while waiting; it may raise to give the request up (Cancel)."""

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Told:
    """What the workers have said of themselves with their last answer.

    Args:
        weights: bytes of each model that all of them have, by rank.
        vaes: keys of the VAEs that all of them have.
    """

    weights: Mapping[ModelSpec, tuple[HeldWeights, ...]] = field(default_factory=dict)
    vaes: frozenset[str] = frozenset()

    @classmethod
    def by(cls, replies: Replies) -> Told:
        by_spec: dict[ModelSpec, list[HeldWeights]] = {}
        for reply in replies.replies:
            for weights in reply.weights:
                by_spec.setdefault(weights.spec, []).append(weights)
        return cls(
            {spec: tuple(held) for spec, held in by_spec.items() if len(held) == len(replies.replies)},
            frozenset.intersection(*(frozenset(reply.vaes) for reply in replies.replies)),
        )


class Conversation:
    """The client's end of the line to the processes of one pool, from one start of them to the next.

    `Pool` lets one thread at a time in; only the properties and `told` may be read by others meanwhile.
    """

    def __init__(self) -> None:
        self.told = Told()
        self.at_end: tuple[Callable[[], None], ...] = ()
        """Called in turn when the processes have been stopped, whatever stopped them."""
        self._processes: PoolProcesses | None = None
        self._lent: tuple[Arena, ...] = ()  # to a request that has not been seen to end
        self._last_id = 0
        self._abandoned = 0  # id of a request whose reply nobody waits for, or 0
        self._untidy = False  # a request failed or was given up, and the workers have not been trimmed since

    @property
    def alive(self) -> bool:
        """Whether the processes have been started and none has been seen to end."""
        return self._processes is not None and self._processes.launcher.poll() is None

    @property
    def launcher_pid(self) -> int:
        """Process id of the launcher; 0 while there is none."""
        return self._processes.launcher.pid if self._processes else 0

    @property
    def workers(self) -> tuple[Ready, ...]:
        """The workers as they said hello; empty until they have."""
        return self._processes.ready.workers if self._processes and self._processes.ready else ()

    @property
    def busy(self) -> bool:
        """Whether a request that was given up is still at work."""
        return self._abandoned != 0

    # The processes.

    def start(self, settings: PoolSettings, poll: Poll | None) -> None:
        """Start the processes if there are none or they have ended, and wait for their hello.

        Raises:
            PoolError: they cannot run here, or have ended.
        """
        if self._processes is not None and self.lost():
            log.warning("The pool had ended and is started again.")
            self.close()
        if self._processes is None:
            if not hasattr(os, "memfd_create"):
                raise PoolError("WanParallel's workers need Linux. On Windows, run ComfyUI inside WSL2.")
            self._processes = PoolProcesses(settings)
        while self._processes.ready is None:
            message = self._receive(poll)
            assert isinstance(message, PoolReady)
            self._processes.ready = message
            log.info("%d workers are up on %s.", settings.plan.num_gpus, message.workers[0].device)

    def lost(self) -> bool:
        """Whether the launcher has ended, or says that a worker has, while nobody asked it anything."""
        if not self.alive:
            return True
        try:
            while self._processes.connection.poll(0):
                message = decode(self._processes.connection.recv_bytes())
                if isinstance(message, PoolFailed):
                    return True
                if isinstance(message, PoolReady):
                    self._processes.ready = message
                elif isinstance(message, Replies) and message.id == self._abandoned:
                    self._abandoned = 0
                    self._note(message)
        except (EOFError, ConnectionError, ProtocolError):
            return True
        return False

    def close(self) -> None:
        """End the processes, if there are any, and let go of what was theirs."""
        if self._processes is not None:
            self._processes.stop()
        self._processes = None
        self.told = Told()
        self._abandoned = 0
        self.lend(())
        for forget in self.at_end:
            forget()

    # The requests.

    def ask(self, request: Callable[[int], Request], poll: Poll | None) -> tuple[Reply, ...]:
        """Ask all workers what `request` makes of an id, and wait for their answers, which come by rank.

        Raises:
            WorkerDied: a process ended; the next `start` starts new ones.
            Exception: what a worker failed with (see errors.py), or what `poll` raised.
        """
        self._last_id += 1  # ids grow by time
        return self._call(request(self._last_id), poll).replies

    def drain(self, poll: Poll | None) -> None:
        """Wait for the reply of a request that was given up: until then the workers use the arenas."""
        while self._abandoned:
            message = self._receive(poll)
            if isinstance(message, Replies) and message.id == self._abandoned:
                self._abandoned = 0
                self._note(message)

    def tidy(self, poll: Poll | None) -> None:
        """After a forward that some ranks did not finish, let all of them drop what they had sent each other."""
        if self._untidy:
            self.ask(Trim, poll)
            self._untidy = False  # not where poll gave it up: then the next forward asks again

    def lend(self, arenas: tuple[Arena, ...]) -> None:
        """Close what was lent to the request before, which has ended, and lend `arenas` to the next one."""
        for arena in self._lent:
            arena.close()
        self._lent = arenas

    def _call(self, request: Request, poll: Poll | None) -> Replies:
        try:
            self._processes.connection.send_bytes(encode(request))
        except ConnectionError:
            self._fail(Failure.of(WorkerDied(self._processes.exit_reason())))
        self._abandoned = request.id
        try:
            while True:
                message = self._receive(poll)
                if isinstance(message, Replies) and message.id == request.id:
                    break
        except BaseException:  # from poll (ComfyUI's interrupt is no Exception), or from a pool that ended
            if self._processes is not None:
                self._cancel(request.id)
            raise
        self._abandoned = 0
        self._note(message)
        if (error := error_among(message.replies)) is not None:
            raise error
        return message

    def _note(self, message: Replies) -> None:
        self._untidy |= any(reply.failure or isinstance(reply.outcome, GivenUp) for reply in message.replies)
        self.told = Told.by(message)

    def _cancel(self, request: int) -> None:
        try:
            self._processes.connection.send_bytes(encode(Cancel(request)))
        except ConnectionError:
            log.warning("The pool ended while a request was being cancelled.")

    def _receive(self, poll: Poll | None) -> object:
        connection = self._processes.connection
        try:
            while not connection.poll(_POLL_SECONDS):
                if poll is not None:
                    poll()
            message = decode(connection.recv_bytes())
        except ProtocolError:
            self.close()
            raise
        except (EOFError, ConnectionError):
            self._fail(Failure.of(WorkerDied(self._processes.exit_reason())))
        if isinstance(message, PoolFailed):
            self._fail(message.failure)
        return message

    def _fail(self, failure: Failure) -> NoReturn:
        self.close()
        raise end_of_pool(failure)
