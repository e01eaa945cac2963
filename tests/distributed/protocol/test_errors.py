"""An error of a worker reaches the client as what it is, or as the nearest that the client knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
from wan_parallel.distributed.client.failures import end_of_pool, error_among
from wan_parallel.distributed.plan.degrees import PlanError
from wan_parallel.distributed.protocol.messages import decode, encode
from wan_parallel.distributed.protocol.pool_errors import (
    AnotherRankRefused,
    Failure,
    OutOfMemory,
    PoolError,
    WorkerDied,
)
from wan_parallel.distributed.protocol.replies import Done, Reply
from wan_parallel.wanvideo.base.tensor_info import CheckpointError
from wan_parallel.wanvideo.base.user_error import UserError

TEXT = "The plan cannot work. Use another."


class TooNarrow(PlanError):
    """A subclass that no list names."""


def arrived(error: Exception) -> Exception | None:
    """What a request fails with where rank 1 of two failed with `error`."""
    replies = Reply(1, 0, Done()), Reply(1, 1, Failure.of(error))
    return error_among([decode(encode(reply)) for reply in replies])


@pytest.mark.parametrize("kind", [TooNarrow, PlanError, CheckpointError, OutOfMemory])
def test_an_error_for_the_user_arrives_as_itself(kind):
    error = arrived(kind(TEXT))
    assert type(error) is kind and str(error) == TEXT


def test_a_class_that_the_client_has_not_imported_arrives_as_its_nearest_base():
    failure = replace(Failure.of(TooNarrow(TEXT)), kinds=("OfAKernelOfTheWorker", *TooNarrow.kinds()[1:]))
    assert type(failure.for_the_user()) is PlanError
    unknown = replace(failure, kinds=("OfAKernelOfTheWorker",)).for_the_user()
    assert type(unknown) is PoolError and str(unknown) == TEXT


def test_any_other_error_is_told_with_its_name_and_rank():
    error = arrived(KeyError("blocks.1"))
    assert type(error) is PoolError
    assert str(error).startswith("Worker rank 1 failed with KeyError: 'blocks.1'. The console has the details")


def test_an_error_without_a_text_has_the_name_of_its_class_for_one():
    assert Failure.of(RuntimeError()).text == "RuntimeError"


def test_the_rank_that_has_the_cause_is_heard():
    failures = [Failure.of(AnotherRankRefused("See the other.")), Failure.of(PlanError(TEXT))]
    error = error_among([Reply(1, rank, failure) for rank, failure in enumerate(failures)])
    assert type(error) is PlanError


def test_where_all_went_well_there_is_no_error():
    assert error_among([Reply(1, 0, Done()), Reply(1, 1, Done())]) is None


def test_a_pool_that_ended_with_an_error_for_the_user_tells_that():
    assert type(end_of_pool(Failure.of(PlanError(TEXT)))) is PlanError
    for failure in (Failure.of(RuntimeError("It broke.")), Failure.of(WorkerDied("Worker rank 1 has ended."))):
        error = end_of_pool(failure)
        assert type(error) is WorkerDied and str(error).endswith(" Queue the prompt again: it starts a new pool.")


def test_two_errors_of_one_name_are_refused():
    with pytest.raises(TypeError, match="has a UserError named PlanError too"):
        type("PlanError", (UserError,), {"__module__": "elsewhere"})
    assert UserError.known(("PlanError",)) is PlanError
