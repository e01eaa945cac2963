"""Host memory that several ranks take at the same time is enough for all of them, or they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testkit import gloo_group, tiny
from wan_parallel.distributed.parallel.pipeline import Stage
from wan_parallel.distributed.parallel.tensor import TensorShard
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import PlacementError
from wan_parallel.distributed.protocol.requests import Offload
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.shm import host, pinned
from wan_parallel.distributed.shm.host import HostShare
from wan_parallel.distributed.shm.pinned import HostMemoryError, PinnedSharedMemory
from wan_parallel.distributed.weights import models as models_module
from wan_parallel.distributed.weights.block_store import BlockStore
from wan_parallel.distributed.weights.models import Models

CPU = torch.device("cpu")
EVERYTHING = 2.0**60
Room = Callable[[float], None]


class Ranks:
    """Rank 0 of a pool of several workers, which do the same at the same time, in this process."""

    def __init__(self, num_gpus: int, monkeypatch: pytest.MonkeyPatch, folder: Path):
        monkeypatch.setattr(models_module, "gather_rows", lambda row, *_rest: [list(row)] * num_gpus)
        self.models = Models(0, PoolSettings(ParallelPlan(num_gpus), "cpu"), CPU, TensorShard(), Stage(0, (0,)))
        self.high, self.low = (
            ModelSpec(tiny.write_checkpoint(folder / f"{name}.safetensors"), "fp32", "fp32", shard_weights="off")
            for name in ("high", "low")
        )

    def load(self, spec: ModelSpec) -> None:
        self.models.load(spec, 64, lambda _heads: None)

    @property
    def copy(self) -> int:
        """Bytes that the expert loaded first takes in host memory."""
        return self.models.loaded[self.high].blocks.device_bytes

    def one_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The device has room for one expert, what stays of another, and activations from now on."""
        memory, demand = self.models.memory, self.models.loaded[self.high].demand
        cap = demand.whole + demand.fixed + demand.activations + 2**16
        monkeypatch.setattr(memory, "free", lambda: cap - sum(m.device_bytes for m in memory.models.values()))


@pytest.fixture
def host_has(monkeypatch) -> Room:
    """Sets the bytes that are free in host memory."""

    def has(nbytes: float) -> None:
        for module in (host, models_module):
            monkeypatch.setattr(module, "host_room", lambda: int(nbytes))

    return has


@pytest.fixture
def two(monkeypatch, tmp_path) -> Ranks:
    ranks = Ranks(2, monkeypatch, tmp_path)
    ranks.load(ranks.high)
    return ranks


def refused() -> object:
    return pytest.raises(PlacementError, match=r"must step out to host memory, which has .* GiB")


def test_two_ranks_do_not_each_move_a_copy_out_where_there_is_room_for_one_and_a_half(two, host_has):
    host_has(1.5 * two.copy)
    before = two.models.loaded[two.high].device_bytes
    with refused() as refusal:
        two.models.offload(Offload(1, two.high, (0, 1), EVERYTHING))
    assert tiny.sentences(str(refusal.value)) == 2
    assert two.models.loaded[two.high].device_bytes == before
    two.models.offload(Offload(1, two.high, (0,), EVERYTHING))  # alone
    assert not two.models.loaded[two.high].blocks.on_device


def test_two_ranks_move_out_where_there_is_room_for_two_copies(two, host_has):
    host_has(2 * two.copy)
    two.models.offload(Offload(1, two.high, (0, 1), EVERYTHING))
    assert not two.models.loaded[two.high].blocks.on_device


@pytest.mark.parametrize("num_gpus, copies, fits", [(1, 1.1, True), (2, 1.5, False), (4, 3.9, False), (4, 4.1, True)])
def test_an_expert_makes_room_for_the_other_if_the_host_has_it_for_all_ranks(
    num_gpus, copies, fits, host_has, monkeypatch, tmp_path
):
    ranks = Ranks(num_gpus, monkeypatch, tmp_path)
    ranks.load(ranks.high)
    copy = ranks.copy
    ranks.one_fits(monkeypatch)
    host_has(copies * copy)
    if fits:
        ranks.load(ranks.low)
        assert not ranks.models.loaded[ranks.high].blocks.on_device
    else:
        with refused():
            ranks.load(ranks.low)
        assert ranks.copy == copy and ranks.low not in ranks.models.loaded


def test_a_forward_that_brings_an_expert_back_shares_the_host_out_too(two, host_has, monkeypatch):
    two.load(two.low)
    two.models.offload(Offload(1, two.high, (0, 1), EVERYTHING))
    two.one_fits(monkeypatch)
    copy = two.models.loaded[two.low].blocks.device_bytes
    host_has(1.5 * copy)
    with refused():
        two.models.settle(two.high, 32)
    assert two.models.loaded[two.low].blocks.device_bytes == copy
    host_has(2 * copy)
    two.models.settle(two.high, 32)
    assert not two.models.loaded[two.low].blocks.on_device


def test_what_a_model_keeps_in_host_memory_counts_beside_what_leaves_for_it(host_has, monkeypatch, tmp_path):
    alone = Ranks(1, monkeypatch, tmp_path)
    alone.load(alone.high)
    copy = alone.copy
    demand = alone.models.loaded[alone.high].demand
    monkeypatch.setattr(alone.models.memory, "room", lambda: demand.whole + demand.activations + 2**16 - copy)
    streamed = replace(alone.low, offload="on")
    host_has(1.5 * copy)
    with refused():
        alone.load(streamed)
    host_has(2 * copy)
    alone.load(streamed)
    assert alone.models.loaded[streamed].blocks.host_bytes == copy


def test_a_block_that_grows_in_host_memory_asks_for_what_it_grows_by(host_has):
    weights = {"blocks.0.w": torch.zeros(1024, dtype=torch.bfloat16)}
    model: dict[str, torch.Tensor] = {}
    numbered = {"number_of": tiny.TINY.block_number, "order": (0,)}
    store = BlockStore(weights, lambda name: (weights[name], None), model.__setitem__, CPU, **numbered)
    store.load(0)
    grown = torch.ones(1024, dtype=torch.float32)
    host_has(2 * 2047)
    with refused():
        store.update(weights, lambda _name: grown, HostShare(2))
    store.load(0)
    host_has(2 * 2048)
    store.update(weights, lambda _name: grown, HostShare(2))
    assert store.host_bytes == 4096


def test_a_share_of_host_memory_is_measured_once(host_has):
    host_has(100)
    share = HostShare(2)
    share.take(0)
    host_has(80)
    share.take(30)
    host_has(10)  # as the others have taken theirs
    share.take(10)
    with refused():
        share.take(1)


SEGMENT_BYTES = 2**20


def pin_in_groups(rank: int, world: int, of: int) -> gloo_group.Results:
    """On each process: whether the ranks in groups of `of` have memory in common, which the host has for 1.5 groups."""
    made = [torch.distributed.new_group(list(range(first, first + of))) for first in range(0, world, of)]
    pinned.host_room = lambda: int(1.5 * of * (SEGMENT_BYTES + 2**16))
    try:
        PinnedSharedMemory(SEGMENT_BYTES, rank % of, of, CPU, made[rank // of], "the test", "Wait.").close()
        return {"pinned": torch.tensor([1])}
    except HostMemoryError:
        return {"pinned": torch.tensor([0])}


@pytest.mark.parametrize("of, fits", [(1, 0), (2, 1)])
def test_groups_that_pin_memory_at_the_same_time_have_room_for_all_of_them(tmp_path, of, fits):
    assert [int(rank["pinned"]) for rank in gloo_group.run(2, pin_in_groups, tmp_path, of)] == [fits] * 2
