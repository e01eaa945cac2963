"""Into which slices Ulysses' exchange cuts the heads, and where its transfers lie.
tests/distributed/parallel/test_sequence.py runs it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import testkit  # noqa: F401 (registers wan_parallel)
import torch
from wan_parallel.distributed.comm.peer_memory import strided
from wan_parallel.distributed.parallel.ulysses_layout import TransferSchedule, UlyssesLayout, cut, cut_for_two_hops

H200 = 132


def turns(counts: tuple[int, ...], queries: int, batch: int, processors: int) -> int:
    return sum(-(-count * batch * -(-queries // 128) // processors) for count in counts)


@pytest.mark.parametrize(
    "heads, queries, cuts",
    [(10, 75_600, (6, 4)), (10, 32_760, (5, 5)), (20, 75_600, (10, 10)), (5, 75_600, (3, 2)), (3, 32_760, (2, 1))],
)
def test_the_cuts_of_released_sizes(heads, queries, cuts):
    assert cut(heads, queries, 1, H200) == cuts


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 1000, 14_040, 75_600])
def test_no_cut_takes_fewer_turns(queries, batch):
    for heads in range(2, 21):
        chosen = cut(heads, queries, batch, H200)
        assert sum(chosen) == heads and all(chosen)
        ways = [(first, heads - first) for first in range(1, heads)]
        assert turns(chosen, queries, batch, H200) == min(turns(way, queries, batch, H200) for way in ways), heads


@pytest.mark.parametrize("heads, cuts", [(0, ()), (1, (1,)), (2, (1, 1)), (5, (3, 2))])
def test_without_a_gpu_slices_are_even(heads, cuts):
    assert cut(heads, 75_600, 1, 0) == cuts


@pytest.mark.parametrize(
    "heads, queries, cuts",
    [
        (20, 32_760, (4, 13, 3)),
        (10, 32_760, (2, 6, 2)),
        (5, 75_600, (1, 2, 2)),
        (3, 32_760, (1, 1, 1)),
        (2, 32_760, (1, 1)),
        (0, 32_760, ()),
    ],
)
def test_the_cuts_of_released_sizes_through_host_memory(heads, queries, cuts):
    assert cut_for_two_hops(heads, queries, 1, H200) == cuts


@pytest.mark.parametrize("processors", [0, H200])
def test_a_long_slice_is_between_two_short_ones(processors):
    for heads in range(3, 21):
        first, middle, last = cut_for_two_hops(heads, 32_760, 1, processors)
        assert first + middle + last == heads and 1 <= max(first, last) <= max(middle, 1 + heads // 4), heads


LAYOUTS = [
    UlyssesLayout((5, 4, 4), ((2, 1), (1, 1), (1,)), 2, 4, torch.float32, apart=False),
    UlyssesLayout((5, 4, 4), ((2, 3, 1), (1, 1), ()), 2, 4, torch.float32, apart=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["near", "far"])
@pytest.mark.parametrize("receiver", range(3))
def test_every_byte_that_a_rank_gets_has_a_place_of_its_own(layout, receiver):
    """In its memory, and where it is set down on the way."""
    there, on_the_way = (torch.zeros(layout.nbytes, dtype=torch.int32) for _ in range(2))
    transfers = [x for kind in "qkv" for sender in range(3) for x in layout.transfers(kind, sender, receiver)]
    transfers += [x for sender in range(3) for x in layout.output_transfers(sender, receiver)]
    for transfer in transfers:
        _, rows, width = transfer.shape
        strided(there, transfer.shape, transfer.offset, transfer.strides_there).add_(1)
        strided(on_the_way, transfer.shape, transfer.packed, (rows * width, width)).add_(1)
    vectors = 3 * layout.tokens * layout.heads[receiver] + layout.lengths[receiver] * sum(layout.heads)
    for counts in (there, on_the_way):
        assert counts.max() == 1 and counts.sum() == layout.nbytes_of(layout.batch * vectors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["near", "far"])
def test_whatever_is_sent_is_waited_for_in_the_order_in_which_it_comes(layout):
    schedules = [TransferSchedule.of(layout, index, [(index + i) % 3 for i in (1, 2, 3)]) for index in range(3)]
    for sender, receiver in itertools.product(range(3), repeat=2):
        inputs = [x for kind in "vkq" for _, transfers in schedules[sender].sent[kind] for x in transfers]
        outputs = [x for transfers in schedules[sender].sent_output for x in transfers]
        sent = [x for x in inputs if x.rank == receiver and layout.heads[receiver]]
        awaited = [replace(x, rank=receiver) for part in schedules[receiver].awaited for x in part if x.rank == sender]
        assert sent == awaited
        coming = [replace(x, rank=receiver) for x in schedules[receiver].awaited_output if x.rank == sender]
        assert [x for x in outputs if x.rank == receiver] == coming
