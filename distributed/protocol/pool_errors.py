"""What a request to a pool fails with, and how errors travel from a worker to the client."""

from __future__ import annotations

from dataclasses import dataclass

from ...wanvideo.base.user_error import UserError


class PoolError(UserError, RuntimeError):
    """A request failed. The pool can be used again."""


class WorkerDied(PoolError):
    """A process of the pool has ended; the next request starts a new pool."""


class WorkerSilent(WorkerDied):
    """A process of the pool showed no sign of life, and the pool was ended; the next request starts a new pool."""


class OutOfMemory(PoolError):
    """A GPU had too little memory for the request."""


class AnotherRankRefused(UserError):
    """A rank cannot do what was asked of all, and says why. The others, which say this, did nothing."""


@dataclass(frozen=True)
class Failure:
    """An error on its way to the client.

    Args:
        text: what the error says.
        kinds: the names of the error's class and of its bases, the nearest first (see `UserError.kinds`).
        for_user: whether the text says what is wrong and what to do; of any other error it is Python's own.
    """

    text: str
    kinds: tuple[str, ...]
    for_user: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure that `error` is."""
        if isinstance(error, UserError):
            return cls(str(error), error.kinds(), True)
        name = type(error).__name__
        return cls(str(error) or name, (name,), False)

    @property
    def elsewhere(self) -> bool:
        """Whether another rank has the cause of the failure."""
        return AnotherRankRefused.__name__ in self.kinds

    def for_the_user(self) -> UserError | None:
        """The error as it was raised, or, where this process has not imported its class, as the nearest base that it
        has; None for an error that is not for the user."""
        if not self.for_user:
            return None
        return (UserError.known(self.kinds) or PoolError)(self.text)
