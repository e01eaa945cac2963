"""What a request to a pool fails with, on the client's side: the error of a worker, or the end of the processes."""

from __future__ import annotations

from collections.abc import Sequence

from ..protocol.pool_errors import Failure, OutOfMemory, PoolError, WorkerDied, WorkerSilent
from ..protocol.replies import Reply

__all__ = ["OutOfMemory", "PoolError", "WorkerDied", "WorkerSilent", "end_of_pool", "error_among"]


def error_among(replies: Sequence[Reply]) -> Exception | None:
    """What a request failed with, in the words of the first worker that has its own; None where it did not."""
    failed = [(reply.rank, reply.failure) for reply in replies if reply.failure is not None]
    if not failed:
        return None
    return _error_of(*next((told for told in failed if not told[1].elsewhere), failed[0]))


def _error_of(rank: int, failure: Failure) -> Exception:
    """What one worker failed with."""
    return failure.for_the_user() or PoolError(
        f"Worker rank {rank} failed with {failure.kinds[0]}: {failure.text.rstrip('.')}. "
        "The console has the details; the workers are ready for the next prompt."
    )


def end_of_pool(failure: Failure) -> Exception:
    """Why the processes have ended."""
    error = failure.for_the_user()
    if error is not None and not isinstance(error, WorkerDied):
        return error
    kind = WorkerDied if error is None else type(error)
    return kind(f"{failure.text} Queue the prompt again: it starts a new pool.")
