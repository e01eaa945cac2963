"""Ulysses' exchange hidden behind computation: exact self-attention over the ranks of one Ulysses group.

The exchange of sequence.py waits twice in each block: for queries, keys and values, and for the way back. Here each of
the three sets out as soon as it is computed, while the products of the next one run, and attention goes in slices of
heads: while one slice is computed, the queries of the next arrive and the output of the one before leaves. Only the
last output and what of the first queries is slower than a product is waited for. The bytes are the same.

Every rank writes into the others' memory (see mailbox.py). No acknowledgement is needed: what a rank sends for a block
it computes from that block's predecessor, for which it needed the output of every other rank, which has therefore
read all that it had been sent; and the output goes to a rank that has sent its queries, so is done with the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

from ..wanvideo.attention import AttentionKernel
from .heads import gather_heads, scatter_heads
from .mailbox import Letter, Mailbox
from .plan import shares
from .sequence import SequenceGroup
from .stopwatch import ALL_TO_ALL, LATER_SLICES, standing

SLICES = 2
"""Slices of a rank's heads. More hide more and make attention kernels smaller."""

_TILE = 128
"""Queries of one head that a block of an attention kernel works on at a time."""

_KEYS, _VALUES, _QUERIES, _OUTPUT = 0, 1, 2, 2 + SLICES  # channels; queries and output have one for each slice
_ALIGN = 256


def cut(heads: int, queries: int, batch: int, processors: int) -> tuple[int, ...]:
    """Heads of each slice of a rank.

    The blocks of an attention kernel take turns on the multiprocessors, and the last turn is seldom a full one. Of all
    ways to cut this is the one with the fewest turns (10 heads of 75,600 queries take 46 on an H200 as 5 and 5, and 45
    as 6 and 4), and the most even one of these.

    Args:
        queries: of each head in one batch item.
        processors: multiprocessors of the rank's GPU; 0 where that does not matter.
    """
    if heads < SLICES:
        return (1,) * heads
    tiles = batch * -(-queries // _TILE)

    def cost(first: int) -> tuple[int, int]:
        turns = sum(-(-count * tiles // processors) for count in (first, heads - first)) if processors else 0
        return turns, abs(heads - 2 * first)

    first = min(range(heads - 1, 0, -1), key=cost)
    return first, heads - first


@dataclass(frozen=True)
class Layout:
    """What lies where in a mailbox: keys, values, queries, output. Tokens lead, so that what all ranks send is one
    sequence.

    Args:
        lengths: tokens of each rank.
        cuts: heads of each slice of each rank.
    """

    lengths: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    batch: int
    head_dim: int
    dtype: torch.dtype

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Of each rank."""
        return tuple(sum(counts) for counts in self.cuts)

    def slices(self, rank: int) -> list[tuple[int, int]]:
        """Start and length of the slices of heads of `rank`, counted from its first head."""
        counts = self.cuts[rank]
        return list(zip(accumulate(counts, initial=0), counts))  # noqa: B905 (accumulate gives the end too)

    def keys(self, rank: int, sender: int) -> int:
        """The byte in the memory of `rank` at which the keys of the tokens of `sender` begin."""
        return self._size(sum(self.lengths[:sender]), self.heads[rank])

    def values(self, rank: int, sender: int) -> int:
        """The same for the values."""
        return self._sequence(rank) + self.keys(rank, sender)

    def own(self, rank: int) -> int:
        """Elements of the queries, keys or values of the tokens of `rank`."""
        return self.lengths[rank] * self.batch * sum(self.heads) * self.head_dim

    def queries(self, rank: int, part: int, sender: int) -> int:
        """The same for the queries of one slice of the heads of `rank`."""
        start, count = self.slices(rank)[part]
        before = self._size(sum(self.lengths), start) + self._size(sum(self.lengths[:sender]), count)
        return 2 * self._sequence(rank) + before

    def output(self, rank: int, part: int, sender: int) -> int:
        """The same for the output that `sender` has computed for the tokens of `rank` in one slice of its heads."""
        before = sum(self.heads[:sender]) + self.slices(sender)[part][0]
        return 3 * self._sequence(rank) + self._size(self.lengths[rank], before)

    @property
    def nbytes(self) -> int:
        """Bytes that the fullest memory needs."""
        ranks = range(len(self.lengths))
        return max(3 * self._sequence(rank) + self._size(self.lengths[rank], sum(self.heads)) for rank in ranks)

    def _sequence(self, rank: int) -> int:
        size = self._size(sum(self.lengths), self.heads[rank])
        return -(-size // _ALIGN) * _ALIGN

    def _size(self, tokens: int, heads: int) -> int:
        return tokens * self.batch * heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Outgoing:
    """The way of queries, keys or values, the same in every block.

    Args:
        parts: where the heads go, in their order: those of this rank into its own mailbox, all others to where the
            copy engines fetch them. They have done so when their like of the next block comes.
        letters: what then leaves.
    """

    parts: tuple[torch.Tensor, ...]
    letters: tuple[Letter, ...]


@dataclass(frozen=True)
class Arrivals:
    """Where in this rank's mailbox lies what all ranks send it.

    Args:
        keys, values: [B, tokens of all, own heads, head_dim].
        queries: the same for each slice of the own heads.
        outputs: [own tokens, B, some heads, head_dim], in the order of the heads.
        own_outputs: those of them that this rank computes, by slice.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    own_outputs: tuple[torch.Tensor, ...]


class OverlappedAttention:
    """Self-attention over the shards of an Ulysses group; all ranks of it call it for the same blocks in turn.

    Args:
        tokens: length of the whole sequence.
        heads: heads of the model.
    """

    def __init__(self, group: SequenceGroup, kernel: AttentionKernel, tokens: int, heads: int, mailbox: Mailbox):
        self.kernel, self.mailbox, self.place = kernel, mailbox, group.ulysses_index
        self.lengths = tuple(shares(tokens, group.degrees.ulysses))
        self.heads = tuple(shares(heads, group.degrees.ulysses))
        ranks = len(self.lengths)  # in an order of its own for each of them, so that not all send to one at a time
        self.others = [(self.place + i) % ranks for i in range(1, ranks)]
        self._layout: Layout | None = None
        self._given: tuple[int, int, torch.dtype] | None = None  # of what the layout depends on, what can change
        self._announced: set[str] = set()

    def announce(self, kind: str, x: torch.Tensor) -> None:
        """Send x [B, n, heads, head_dim], the queries, keys or values ("q", "k", "v") of this rank's tokens."""
        self._prepare(x)
        self._announced.add(kind)
        outgoing = self._outgoing[kind]
        scatter_heads(x, outgoing.parts)
        self.mailbox.send(outgoing.letters)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, n, heads, head_dim] of this rank's tokens; returns their attention output, same shape."""
        for kind, x in (("v", v), ("k", k), ("q", q)):
            if kind not in self._announced:
                self.announce(kind, x)
        self._announced.clear()
        arrivals, among = self._arrivals, self.mailbox.members
        with standing(ALL_TO_ALL, among):
            self.mailbox.wait(self.others, _KEYS, _VALUES, _QUERIES)
        for part, (start, count) in enumerate(self._layout.slices(self.place)):
            if part:
                with standing(LATER_SLICES, among):
                    self.mailbox.wait(self.others, _QUERIES + part)
            heads = slice(start, start + count)
            out = self.kernel(arrivals.queries[part], arrivals.keys[:, :, heads], arrivals.values[:, :, heads])
            self._send_output(part, out.transpose(0, 1).contiguous())
        return self._output(torch.empty_like(q, memory_format=torch.contiguous_format))

    def _prepare(self, x: torch.Tensor) -> None:
        given = len(x), x.shape[-1], x.dtype
        if given == self._given:
            return
        cuts = zip(self.heads, self.mailbox.processors, strict=True)
        cuts = tuple(cut(heads, sum(self.lengths), len(x), processors) for heads, processors in cuts)
        layout = Layout(self.lengths, cuts, *given)
        with standing(ALL_TO_ALL, self.mailbox.members):
            self.mailbox.arrange(layout, layout.nbytes)
        self._layout, self._given = layout, given
        self._arrivals = self._all_arrivals(layout)
        self._outgoing = {kind: self._way_of(kind, layout, x.device) for kind in "vkq"}

    def _way_of(self, kind: str, layout: Layout, device: torch.device) -> Outgoing:
        parts, letters, me = [], [], self.place
        packed = torch.empty(layout.own(me), dtype=layout.dtype, device=device)
        self.mailbox.hold(packed)
        for rank, heads, offset, channel in self._parcels(kind, layout):
            shape = (self.lengths[me], layout.batch, heads, layout.head_dim)
            if rank == me:
                parts.append(self.mailbox.own(offset, shape, layout.dtype))
                continue
            part, packed = packed[: prod(shape)], packed[prod(shape) :]
            parts.append(part.view(shape))
            letters.append(Letter(rank, offset, parts[-1], channel))
        letters.sort(key=lambda letter: (letter.channel, self.others.index(letter.rank)))  # first what is needed first
        return Outgoing(tuple(parts), tuple(letters))

    def _parcels(self, kind: str, layout: Layout) -> Iterator[tuple[int, int, int, int]]:
        """Of this rank's queries, keys or values, in the order of the heads: to whom, how many heads, to which byte,
        on which channel."""
        for rank, heads in enumerate(self.heads):
            if kind == "k":
                yield rank, heads, layout.keys(rank, self.place), _KEYS
            elif kind == "v":
                yield rank, heads, layout.values(rank, self.place), _VALUES
            else:
                for part, (_, count) in enumerate(layout.slices(rank)):
                    yield rank, count, layout.queries(rank, part, self.place), _QUERIES + part

    def _all_arrivals(self, layout: Layout) -> Arrivals:
        me, n = self.place, self.lengths[self.place]

        def sequence(offset: int, heads: int) -> torch.Tensor:
            shape = (sum(self.lengths), layout.batch, heads, layout.head_dim)
            return self.mailbox.own(offset, shape, layout.dtype).transpose(0, 1)

        outputs = {
            (sender, part): self.mailbox.own(
                layout.output(me, part, sender), (n, layout.batch, count, layout.head_dim), layout.dtype
            )
            for sender in range(len(self.lengths))
            for part, (_, count) in enumerate(layout.slices(sender))
        }
        return Arrivals(
            sequence(layout.keys(me, 0), self.heads[me]),
            sequence(layout.values(me, 0), self.heads[me]),
            tuple(
                sequence(layout.queries(me, part, 0), count) for part, (_, count) in enumerate(layout.slices(me))
            ),
            tuple(outputs.values()),
            tuple(output for (sender, _), output in outputs.items() if sender == me),
        )

    def _send_output(self, part: int, output: torch.Tensor) -> None:
        """Output [tokens, B, some heads, head_dim] of all tokens to those who have them."""
        layout, rows = self._layout, output.split(self.lengths)
        self.mailbox.hold(output)
        self.mailbox.send(
            [Letter(r, layout.output(r, part, self.place), rows[r], _OUTPUT + part) for r in self.others]
        )
        self._arrivals.own_outputs[part].copy_(rows[self.place])

    def _output(self, result: torch.Tensor) -> torch.Tensor:
        """Into `result` [B, n, heads, head_dim], what all ranks have computed for this rank's tokens."""
        with standing(ALL_TO_ALL, self.mailbox.members):
            for part in range(SLICES):
                senders = [rank for rank in self.others if part < len(self._layout.slices(rank))]
                self.mailbox.wait(senders, _OUTPUT + part)
        gather_heads(self._arrivals.outputs, result)
        return result
