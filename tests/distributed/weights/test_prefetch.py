"""Blocks arrive one ahead, and a forward that fails leaves nothing under way."""

from __future__ import annotations

import pytest
import torch
from testkit import tiny
from wan_parallel.distributed.comm.collectives import ShareGroup
from wan_parallel.distributed.weights import prefetch
from wan_parallel.distributed.weights.block_store import BlockStore
from wan_parallel.distributed.weights.prefetch import BlockPrefetcher, PrefetchBuffers

CPU = torch.device("cpu")


class Gather:
    """A gather under way."""

    def __init__(self) -> None:
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1


class Gathers:
    """The gathers of a group of two ranks, of which the second one of all fails."""

    def __init__(self) -> None:
        self.started: list[Gather] = []
        self.failures = 1

    def __call__(self, whole: torch.Tensor, share: torch.Tensor, group: object, async_op: bool) -> Gather:
        if self.started and self.failures:
            self.failures -= 1
            raise RuntimeError("a gather cannot start")
        whole.view(2, -1).copy_(share)
        self.started.append(Gather())
        return self.started[-1]


@pytest.fixture
def gathers(monkeypatch) -> Gathers:
    gathers = Gathers()
    monkeypatch.setattr(prefetch, "all_gather_single", gathers)
    return gathers


def test_a_forward_that_cannot_begin_waits_for_what_it_has_started(gathers):
    weights = {f"blocks.{i}.w": torch.full((8,), float(i)) for i in range(3)}
    model: dict[str, torch.Tensor] = {}
    numbered = {"number_of": tiny.TINY.block_number, "order": (0, 1, 2)}
    read = lambda name: (weights[name], None)  # noqa: E731
    store = BlockStore(weights, read, model.__setitem__, CPU, ShareGroup(ranks=2), **numbered)
    store.load(3)
    prefetcher = BlockPrefetcher(store, PrefetchBuffers(CPU))
    with pytest.raises(RuntimeError, match="cannot start"), prefetcher.prefetching(1):
        pytest.fail("a forward that cannot begin must not run")
    assert [gather.waited for gather in gathers.started] == [1]
    with prefetcher.prefetching(2):
        for number in (0, 1, 2) * 2:
            prefetcher.await_block(number)
            assert torch.equal(model[f"blocks.{number}.w"], weights[f"blocks.{number}.w"])
    assert [gather.waited for gather in gathers.started] == [1] * 7
