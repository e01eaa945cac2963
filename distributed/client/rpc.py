"""What the client and its workers say to each other: start them, ask, wait for all answers, give up, notice their end.

One request is under way at a time. Whoever waits is called back ten times a second and may raise to give the request
up (ComfyUI's Cancel). The workers are then told, and go on until they see it (see cancel.py). Two things follow:

- they may still read and write the memory that they were shown, so `wait_for_abandoned` comes before it is used;
- some ranks may have left a forward that others finished, so `reset_after_abort` lets all drop
  what they had sent each other.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from ..executors.executor import Executor, RanksEnded
from ..protocol.codec import ProtocolError
from ..protocol.messages import Cancel, Message, PoolReady, Ready
from ..protocol.pool_errors import Failure, PoolError
from ..protocol.replies import GivenUp, Replies
from ..protocol.requests import Request, Trim
from ..protocol.silence import WORKING, Silence, SilentProcess
from ..protocol.specs import PoolSettings
from ..shm.arena import Arena
from .failures import end_of_pool, error_among

log = logging.getLogger(__name__)

Poll = Callable[[], None]
"""Called while waiting; it may raise to give the request up (Cancel)."""

OutcomeT = TypeVar("OutcomeT")
_POLL_SECONDS = 0.1


class WorkersBusy(PoolError):
    """The workers have not come to a request in the time that its caller gave them. The request may be done later."""


def within(seconds: float, poll: Poll | None, what: str) -> Poll:
    """A poll that gives a request up after so many seconds, beside what `poll` does.

    Args:
        what: the request, as the subject of a sentence.

    Raises:
        WorkersBusy: by the returned poll, once the time is over.
    """
    end = time.monotonic() + seconds

    def check() -> None:
        if poll is not None:
            poll()
        if time.monotonic() > end:
            raise WorkersBusy(
                f"{what} has waited {seconds:.0f} s for the workers, which do something else. "
                "Wait until they are done, or restart ComfyUI."
            )

    return check


class Turn:
    """Lets one thread at a time use the workers; those that wait can be called off. A thread may take it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def taken(self, poll: Poll | None) -> Iterator[None]:
        """Wait for the turn, and have it in the block.

        Args:
            poll: called ten times a second while waiting. What it raises is passed on, without the turn.
        """
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            if poll is not None:
                poll()
        try:
            yield
        finally:
            self._lock.release()


class SilenceNote:
    """What a pool's executor has said of processes without a sign of life. Any thread may read `text`."""

    def __init__(self) -> None:
        self._told: tuple[SilentProcess, ...] = ()
        self._since = 0.0

    @property
    def text(self) -> str:
        """What a user reads now; "" where nothing is to be said."""
        told, elapsed = self._told, time.monotonic() - self._since
        return " ".join(process.warning(elapsed) for process in told)

    @property
    def at_rest(self) -> bool:
        """Whether a process does nothing, and is not only slow."""
        return any(process.kind != WORKING for process in self._told)

    def hear(self, silence: Silence) -> None:
        """Note it, and log it."""
        if self._told and not silence.processes:
            log.info("All processes of the pool show signs of life again.")
        self._told, self._since = silence.processes, time.monotonic()
        for process in self._told:
            log.warning("%s", process.warning())

    def forget(self) -> None:
        """The pool has answered or ended."""
        self._told = ()


@dataclass(frozen=True)
class Answers(Generic[OutcomeT]):
    """What all workers answered to a request, by rank: what the request names as its outcome, and the seconds."""

    outcomes: tuple[OutcomeT, ...]
    seconds: tuple[float, ...]


class WorkerClient:
    """The client's end of the line to the workers of one pool, from one start of them to the next.

    `Pool` lets one thread at a time in; only `alive`, `pid`, `workers` and `silence` may be read by others meanwhile.

    Attributes:
        silence: what is to be said of processes without a sign of life.
        workers: as they said hello, by rank; empty until they have.
        at_reply: called in turn with the replies of all workers to each request, those to abandoned ones included.
        at_end: called in turn when the workers have been stopped, whatever stopped them.
    """

    def __init__(self, executor: Executor) -> None:
        self.workers: tuple[Ready, ...] = ()
        self.at_reply: tuple[Callable[[Replies], None], ...] = ()
        self.at_end: tuple[Callable[[], None], ...] = ()
        self.silence = SilenceNote()
        self._executor = executor
        self._started = self._leaving = False
        self._lent: tuple[Arena, ...] = ()  # to a request that has not been seen to end
        self._last_id = 0
        self._abandoned = 0  # id of a request whose reply nobody waits for, or 0
        self._untidy = False  # a request failed or was given up, and the workers have not been trimmed since
        _clients.add(self)

    @property
    def alive(self) -> bool:
        """Whether the workers have been started and none has been seen to end."""
        return self._executor.alive

    @property
    def pid(self) -> int:
        """See `Executor.pid`."""
        return self._executor.pid

    @property
    def busy(self) -> bool:
        """Whether a request that was given up is still at work."""
        return self._abandoned != 0

    # The processes.

    def start(self, settings: PoolSettings, poll: Poll | None) -> None:
        """Start the workers if there are none or they have ended, and wait for their hello.

        Raises:
            PoolError: they cannot run here, or have ended.
        """
        self._stay_if_leaving()
        if self._started and self.lost():
            log.warning("The pool had ended and is started again.")
            self.close()
        if not self._started:
            self._executor.start(settings)
            self._started = True
        while not self.workers:
            self._hear(self._receive(poll))

    def lost(self) -> bool:
        """Whether workers have ended while nobody asked them anything."""
        if not self._executor.alive:
            return True
        try:
            while (message := self._executor.receive(0)) is not None:
                self._hear(message)
        except (RanksEnded, ProtocolError):
            return True
        return False

    def close(self) -> None:
        """End the workers, if there are any, and let go of what was theirs."""
        self._executor.stop()
        self._started = False
        self.workers = ()
        self._abandoned = 0
        self.silence.forget()
        self.lend(())
        for forget in self.at_end:
            forget()

    def leave(self) -> None:
        """End the workers as this process ends. A thread that waits for them waits on: it must not take that for a
        fault, nor start others."""
        self._leaving = True
        self._executor.stop()

    def _stay_if_leaving(self) -> None:
        if self._leaving:
            threading.Event().wait()  # only daemon threads are left, which end with the process

    # The requests.

    def ask(self, request: Callable[[int], Request[OutcomeT]], poll: Poll | None) -> Answers[OutcomeT]:
        """Ask all workers what `request` makes of an id, and wait for their answers.

        Raises:
            WorkerDied: a process ended; the next `start` starts new ones.
            Exception: what a worker failed with (see failures.py), or what `poll` raised.
        """
        self._last_id += 1  # ids grow by time
        asked = request(self._last_id)
        replies = self._call(asked, poll).replies
        if (error := error_among(replies)) is not None:
            raise error
        outcomes = tuple(reply.outcome for reply in replies if isinstance(reply.outcome, asked.outcome))
        if len(outcomes) < len(replies):
            raise ProtocolError(
                f"A worker has answered {type(asked).__name__} with something else than {asked.outcome.__name__}. "
                "Restart ComfyUI after updating WanParallel."
            )
        return Answers(outcomes, tuple(reply.seconds for reply in replies))

    def wait_for_abandoned(self, poll: Poll | None) -> None:
        """Wait for the reply of a request that was given up: until then the workers use the arenas."""
        while self._abandoned:
            self._hear(self._receive(poll))

    def reset_after_abort(self, poll: Poll | None) -> None:
        """After a forward that some ranks did not finish, let all of them drop what they had sent each other."""
        if self._untidy:
            self.ask(Trim, poll)
            self._untidy = False  # not where poll gave it up: then the next forward asks again

    def lend(self, arenas: tuple[Arena, ...]) -> None:
        """Close what was lent to the request before, which has ended, and lend `arenas` to the next one."""
        for arena in self._lent:
            arena.close()
        self._lent = arenas

    def _call(self, request: Request[OutcomeT], poll: Poll | None) -> Replies:
        try:
            self._executor.send(request)
        except RanksEnded as end:
            self._fail(end.failure)
        self._abandoned = request.id
        try:
            while True:
                message = self._receive(poll)
                if isinstance(message, Replies) and message.id == request.id:
                    break
        except BaseException:  # from poll (ComfyUI's interrupt is no Exception), or from a pool that ended
            if self._started:
                self._cancel(request.id)
            raise
        self._hear(message)
        return message

    def _hear(self, message: Message) -> None:
        """Take note of a message that nobody else looks at."""
        if isinstance(message, PoolReady):
            self.workers = message.workers
            log.info("%d workers are up on %s.", len(self.workers), self.workers[0].device)
        elif isinstance(message, Silence):
            self.silence.hear(message)
        elif isinstance(message, Replies) and message.id == self._abandoned:
            self._abandoned = 0
            self.silence.forget()
            self._untidy |= any(reply.failure or isinstance(reply.outcome, GivenUp) for reply in message.replies)
            for listen in self.at_reply:
                listen(message)

    def _cancel(self, request: int) -> None:
        try:
            self._executor.send(Cancel(request))
        except RanksEnded:
            log.warning("The pool ended while a request was being cancelled.")

    def _receive(self, poll: Poll | None) -> Message:
        """The next message that is about a request or a start."""
        try:
            while (message := self._executor.receive(_POLL_SECONDS)) is None or isinstance(message, Silence):
                if message is not None:
                    self._hear(message)
                if poll is not None:
                    poll()
        except RanksEnded as end:
            self._fail(end.failure)
        except ProtocolError:
            self.close()
            raise
        return message

    def _fail(self, failure: Failure) -> NoReturn:
        self._stay_if_leaving()
        self.close()
        raise end_of_pool(failure)


_clients: weakref.WeakSet[WorkerClient] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    for client in [*_clients]:
        client.leave()
