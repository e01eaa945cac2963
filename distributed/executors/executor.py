"""What a pool asks of whatever starts its ranks and reaches them, on whichever machines they live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ..protocol.messages import Cancel, Message
from ..protocol.pool_errors import Failure
from ..protocol.requests import Request
from ..protocol.specs import PoolSettings, RankLocation
from ..shm.arena import Arena


class RanksEnded(Exception):
    """The ranks of a pool have ended, or cannot be reached any more."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


class Executor(ABC):
    """The ranks of one pool: where they live, how they start and end, and how messages and tensors reach them.

    An executor can be started again after `stop`. One thread at a time calls its methods; others may read `alive` and
    `pid` meanwhile.
    """

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the ranks have been started and have not been seen to end."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """A process id on this host that tells one start of the ranks from another; 0 while there are none."""

    @abstractmethod
    def resolve(self, settings: PoolSettings) -> PoolSettings:
        """The settings with a `device` of "auto" replaced by what it means where the ranks would live.

        Raises:
            PlanError: there are too few devices for the plan.
        """

    @abstractmethod
    def locations(self, settings: PoolSettings) -> tuple[RankLocation, ...]:
        """Where each rank lives, by rank."""

    @abstractmethod
    def start(self, settings: PoolSettings) -> None:
        """Start all ranks, and return at once: the first message that `receive` gives is `PoolReady`.

        Raises:
            PoolError: ranks cannot run here.
        """

    @abstractmethod
    def send(self, message: Request[Any] | Cancel) -> None:
        """Send a request to all ranks, or tell them that the client no longer waits for one.

        Raises:
            RanksEnded: nobody is there to hear it.
        """

    @abstractmethod
    def receive(self, seconds: float) -> Message | None:
        """The next message; None where none came in time.

        It is `PoolReady`, the `Replies` of all ranks to a request, or a `Silence`, which says whose signs of life are
        missing.

        Raises:
            RanksEnded: none will come any more. The failure is a `WorkerSilent` where the executor has waited for a
                sign of life for as long as `SilenceLimits` says.
            ProtocolError: what came is no message of ours.
        """

    @abstractmethod
    def stop(self) -> None:
        """End all ranks, if there are any."""

    @abstractmethod
    def make_arena(self, nbytes: int, pinned: bool = False) -> Arena:
        """Memory in which tensors travel: what this process writes there every rank reads through its `ref`, and what
        ranks write there this process reads once they have replied.

        Args:
            pinned: as in `Arena`.
        """
