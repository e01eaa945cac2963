"""How Ulysses' exchange is cut into transfers, which ulysses_overlap.py sends.

Decided here are the slices into which a rank's heads are cut, where in each rank's memory the queries, keys, values and
output lie, and the order in which they travel.

The heads of a rank are columns of a matrix of tokens, which copy engines read and write as fast as one run of
bytes (266 to 390 GB/s over NVLink from 256 bytes a row on): nothing is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, groupby
from operator import itemgetter

import torch

from ..comm.peer_memory import Transfer

MOST_SLICES = 3
_FIRST_SIGNAL = {kind: number * MOST_SLICES for number, kind in enumerate(("v", "k", "q", "output"))}
_ALIGN = 256

_TILE = 128
"""Queries of one head that a block of an attention kernel works on at a time."""
_HOP = 0.1
"""The time of a copy of a head's queries to or from host memory, as a part of the time of the head's attention: 0.12
for 2 H200s on PCIe 5 and 32,760 tokens, less for slower GPUs and more tokens."""


@lru_cache(maxsize=64)
def cut(heads: int, queries: int, batch: int, processors: int) -> tuple[int, ...]:
    """Heads of each slice of a rank, where tensors travel fast: two slices, as more make attention kernels smaller.

    The blocks of an attention kernel take turns on the multiprocessors, and the last turn is seldom a full one. Of all
    ways to cut this is the one with the fewest turns (10 heads of 75,600 queries take 46 on an H200 as 5 and 5, and 45
    as 6 and 4), and the most even one of these.

    Args:
        queries: of each head in one batch item.
        processors: multiprocessors of the rank's GPU; 0 where that does not matter.
    """
    if heads < 2:
        return (1,) * heads
    tiles = batch * -(-queries // _TILE)
    ways = ((first, heads - first) for first in range(heads - 1, 0, -1))
    return min(ways, key=lambda way: (_turns(way, tiles, processors), abs(way[0] - way[1])))


@lru_cache(maxsize=64)
def cut_for_two_hops(heads: int, queries: int, batch: int, processors: int) -> tuple[int, ...]:
    """Heads of each slice of a rank, where tensors travel through host memory.

    A short slice, which arrives soon, a long slice, and a short slice, whose output has left soon.

    Of all ways to cut, the one with the least expected time is chosen. The time is the sum of the turns, the transfers
    of the first slice's queries and of the last slice's output, and of the other transfers that part which lasts longer
    than the slice before; it is counted in the time of one head's attention. Arguments as those of `cut`.
    """
    if heads < MOST_SLICES:
        return (1,) * heads
    tiles = batch * -(-queries // _TILE)

    def cost(way: tuple[int, int, int]) -> float:
        first, middle, last = way
        turns = _turns(way, tiles, processors) * processors / tiles
        late = max(0.0, 3 * _HOP * middle - first)  # keys up, queries up, queries down
        late += max(0.0, 2 * _HOP * middle - last)  # output up and down
        return turns + 2 * _HOP * (first + last) + late

    ways = ((first, heads - first - last, last) for first in range(1, heads - 1) for last in range(1, heads - first))
    return min(ways, key=cost)


def _turns(way: Sequence[int], tiles: int, processors: int) -> int:
    return sum(-(-count * tiles // processors) for count in way) if processors else 0


@dataclass(frozen=True)
class UlyssesLayout:
    """Where keys, values, queries and output, each [B, tokens, heads, head_dim], lie in peer memory.

    Args:
        lengths: tokens of each rank.
        cuts: heads of each slice of each rank.
        apart: the slices of keys and values travel and lie apart, as those of queries always do.
    """

    lengths: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    batch: int
    head_dim: int
    dtype: torch.dtype
    apart: bool

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Heads of each rank."""
        return tuple(sum(counts) for counts in self.cuts)

    @property
    def tokens(self) -> int:
        """Tokens of all ranks together."""
        return sum(self.lengths)

    def slices(self, rank: int) -> list[tuple[int, int]]:
        """Start and length of the slices of heads of `rank`, counted from its first head."""
        counts = self.cuts[rank]
        return list(zip(accumulate(counts, initial=0), counts))  # noqa: B905 (accumulate gives the end too)

    def head_runs(self, kind: str, rank: int) -> list[tuple[int, int]]:
        """Start and length of the runs of heads of `rank` whose queries, keys or values ("q", "k", "v") travel
        together, counted from its first head."""
        return self.slices(rank) if self.apart or kind == "q" else [(0, self.heads[rank])]

    def offset(self, kind: str, rank: int, first: int) -> int:
        """The byte in the memory of `rank` at which the run of heads begins whose first one is its head `first`."""
        return "kvq".index(kind) * self._all_heads(rank) + self.nbytes_of(self.batch * self.tokens * first)

    def output_offset(self, rank: int) -> int:
        """The byte in the memory of `rank` at which the output of all heads for its tokens begins."""
        return 3 * self._all_heads(rank)

    def nbytes_of(self, vectors: int) -> int:
        """Bytes of so many vectors of a head."""
        return vectors * self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that the fullest memory needs."""
        own = (self.nbytes_of(self.batch * length * sum(self.heads)) for length in self.lengths)
        return max(self.output_offset(rank) + size for rank, size in enumerate(own))

    def transfers(self, kind: str, sender: int, receiver: int) -> list[Transfer]:
        """The part of the queries, keys or values [B, n, heads, head_dim] of `sender` that goes to `receiver`, one
        transfer for each run of the receiver's heads."""
        before, n = sum(self.lengths[:sender]), self.lengths[sender]
        vector, row = self.nbytes_of(1), self.nbytes_of(sum(self.heads))
        transfers = []
        for part, (first, count) in enumerate(self.head_runs(kind, receiver)):
            width, there = count * vector, self.offset(kind, receiver, first)
            transfers.append(
                Transfer(
                    receiver,
                    _FIRST_SIGNAL[kind] + part,
                    (self.batch, n, width),
                    start=(sum(self.heads[:receiver]) + first) * vector,
                    strides=(n * row, row),
                    offset=there + before * width,
                    strides_there=(self.tokens * width, width),
                    packed=there + self.batch * before * width,
                )
            )
        return transfers

    def output_transfers(self, sender: int, receiver: int) -> list[Transfer]:
        """The part of the output [B, tokens of all, heads of a slice, head_dim] of `sender` that goes to `receiver`,
        one transfer for each slice of the sender's heads."""
        n, vector, row = self.lengths[receiver], self.nbytes_of(1), self.nbytes_of(sum(self.heads))
        transfers = []
        for part, (first, count) in enumerate(self.slices(sender)):
            width, before = count * vector, (sum(self.heads[:sender]) + first) * vector
            transfers.append(
                Transfer(
                    receiver,
                    _FIRST_SIGNAL["output"] + part,
                    (self.batch, n, width),
                    start=sum(self.lengths[:receiver]) * width,
                    strides=(self.tokens * width, width),
                    offset=self.output_offset(receiver) + before,
                    strides_there=(n * row, row),
                    packed=self.output_offset(receiver) + self.batch * n * before,
                )
            )
        return transfers

    def _all_heads(self, rank: int) -> int:
        """Bytes of the keys, values or queries of all tokens for the heads of `rank`."""
        size = self.nbytes_of(self.batch * self.tokens * self.heads[rank])
        return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class TransferSchedule:
    """The transfers that one rank sends for each block, and those that it waits for, in the order in which they travel.

    Values set out whole, then the keys and the queries of the first slice, and then what the later slices need.

    Args:
        sent: by kind ("q", "k", "v"), what is sent once this kind is computed: pairs of a kind and its transfers.
        sent_output: what is sent once the output of each slice of the rank's heads is computed.
        awaited: what is waited for before each slice of the rank's heads.
        awaited_output: what is waited for at the end.
    """

    sent: dict[str, list[tuple[str, list[Transfer]]]]
    sent_output: list[list[Transfer]]
    awaited: list[list[Transfer]]
    awaited_output: list[Transfer]

    @classmethod
    def of(cls, layout: UlyssesLayout, index: int, order: Sequence[int]) -> TransferSchedule:
        """The schedule of the rank `index` of the Ulysses group, which serves the ranks in this order."""
        out = {kind: _by_part(layout.transfers(kind, index, rank) for rank in order) for kind in "vkq"}
        coming = {kind: _by_part(_from(rank, layout.transfers(kind, rank, index)) for rank in order) for kind in "vkq"}
        first_keys, *later_keys = out["k"] or [[]]
        with_queries = [("q", transfers) for transfers in out["q"]]
        for part, transfers in enumerate(later_keys):
            with_queries.insert(2 * part + 1, ("k", transfers))
        awaited = [[*_at(coming["k"], part), *_at(coming["q"], part)] for part in range(len(layout.cuts[index]))]
        if awaited:
            awaited[0] = [*chain(*coming["v"]), *awaited[0]]
        return cls(
            sent={
                "v": [("v", [*chain(*out["v"])])],
                "k": [("k", first_keys)],
                "q": [
                    (kind, [*chain(*(transfers for _, transfers in together))])
                    for kind, together in groupby(with_queries, key=itemgetter(0))
                ],
            },
            sent_output=_by_part(layout.output_transfers(index, rank) for rank in order),
            awaited=awaited,
            awaited_output=[*chain(*_by_part(_from(rank, layout.output_transfers(rank, index)) for rank in order))],
        )


def _from(rank: int, transfers: Iterable[Transfer]) -> list[Transfer]:
    """Transfers as their receiver waits for them: `rank`, the sender, takes the place of the receiver."""
    return [replace(transfer, rank=rank) for transfer in transfers]


def _by_part(transfers: Iterable[Sequence[Transfer]]) -> list[list[Transfer]]:
    """The first transfer of every rank, then the second of every rank that has more, and so on."""
    rows = list(transfers)
    return [[row[part] for row in rows if part < len(row)] for part in range(max(map(len, rows), default=0))]


def _at(parts: Sequence[list[Transfer]], part: int) -> list[Transfer]:
    return parts[part] if part < len(parts) else []
