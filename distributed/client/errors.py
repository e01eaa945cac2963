"""What a request to a pool fails with, on the client's side.

Workers tell an error by the name of its class. What the client can do something about has a class of its own here or
in the part that it comes from; the rest is a `PoolError`, whose text says what is wrong and what to do all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...wanvideo.attention.kernels import AttentionError
from ...wanvideo.base.tensor_info import CheckpointError
from ..plan.degrees import PlanError
from ..plan.placement import PlacementError
from ..protocol.messages import PoolFailed, Reply


class PoolError(RuntimeError):
    """A request failed. The pool can be used again."""


class WorkerDied(PoolError):
    """A process of the pool has ended; the next request starts a new pool."""


class OutOfMemory(PoolError):
    """A GPU had too little memory for the request."""


_ERRORS = {cls.__name__: cls for cls in (CheckpointError, AttentionError, PlanError, PlacementError, OutOfMemory)}
_WORKERS_OWN = ("BackendError", "Fp8Error", "HostMemoryError", "MissingPackage", "PatchError", "StaleError", "VAEError")
_ERRORS |= dict.fromkeys(_WORKERS_OWN, PoolError)


def error_among(replies: Sequence[Reply]) -> Exception | None:
    """What a request failed with, in the words of the first worker that has its own; None where it did not."""
    failed = [reply for reply in replies if reply.error]
    if not failed:
        return None
    return error_of(next((reply for reply in failed if reply.kind != "AnotherRankRefused"), failed[0]))


def error_of(reply: Reply) -> Exception:
    """What one worker says to have failed with."""
    if reply.kind in _ERRORS:
        return _ERRORS[reply.kind](reply.error)
    return PoolError(
        f"Worker rank {reply.rank} failed with {reply.kind}: {reply.error.rstrip('.')}. "
        "The console has the details; the workers are ready for the next prompt."
    )


def end_of_pool(failed: PoolFailed) -> Exception:
    """Why the processes have ended."""
    if failed.kind in _ERRORS:
        return _ERRORS[failed.kind](failed.reason)
    return WorkerDied(f"{failed.reason} Queue the prompt again: it starts a new pool.")
