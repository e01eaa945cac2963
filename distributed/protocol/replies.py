"""What workers answer: one `Reply` from each, whose outcome is what the request names, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from .pool_errors import Failure
from .reports import AttentionUse, DeviceProfile, Exchange, HeldWeights, WaitTimes, WorkerStatus


@dataclass(frozen=True)
class Done:
    """What was asked for is done, and there is nothing to tell of it."""


@dataclass(frozen=True)
class ForwardDone:
    """A forward's result lies in the arena.

    Args:
        waits: where the device stood still meanwhile.
        exchange: what was exchanged with the other patches; None in an exact forward.
        attention: how self-attention was computed; None where the request asked for the model's own.
    """

    waits: tuple[WaitTimes, ...]
    exchange: Exchange | None = None
    attention: AttentionUse | None = None


@dataclass(frozen=True)
class GivenUp:
    """The client had given the request up, and the worker left it."""


Outcome = Done | ForwardDone | WorkerStatus | DeviceProfile | GivenUp | Failure


@dataclass(frozen=True)
class Reply:
    """One worker's answer to a request.

    Args:
        id: the request's.
        seconds: that the worker took.
        weights: of every model that the worker now has.
        vaes: keys of the VAEs that it now has.
    """

    id: int
    rank: int
    outcome: Outcome
    seconds: float = 0.0
    weights: tuple[HeldWeights, ...] = ()
    vaes: tuple[str, ...] = ()

    @property
    def failure(self) -> Failure | None:
        """What the request failed with on this worker; None where it did not."""
        return self.outcome if isinstance(self.outcome, Failure) else None


@dataclass(frozen=True)
class Replies:
    """Every worker's answer to one request, by rank."""

    id: int
    replies: tuple[Reply, ...]
