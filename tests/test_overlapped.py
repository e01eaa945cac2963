"""Into which slices Ulysses' exchange cuts the heads. tests/test_sequence.py runs it."""

from __future__ import annotations

import pytest
from wan_parallel.distributed.overlapped import cut

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
@pytest.mark.parametrize("heads", range(2, 21))
def test_no_cut_takes_fewer_turns(heads, queries, batch):
    chosen = cut(heads, queries, batch, H200)
    assert sum(chosen) == heads and all(chosen)
    ways = [(first, heads - first) for first in range(1, heads)]
    assert turns(chosen, queries, batch, H200) == min(turns(way, queries, batch, H200) for way in ways)


@pytest.mark.parametrize("heads, cuts", [(0, ()), (1, (1,)), (2, (1, 1)), (5, (3, 2))])
def test_without_a_gpu_slices_are_even(heads, cuts):
    assert cut(heads, 75_600, 1, 0) == cuts
