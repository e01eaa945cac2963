"""Ulysses' exchange hidden behind computation: exact self-attention over the ranks of one Ulysses group.

The exchange of sequence.py waits twice in each block: for queries, keys and values, and for the way back. Here each of
the three sets out as soon as it is computed, while the products of the next one run, and attention goes in slices of
heads: while one slice is computed, the queries of the next arrive and the output of the one before leaves. Only the
last output and what of the first queries is slower than a product is waited for. The bytes are the same. The heads of a
rank are columns of a matrix of tokens, which copy engines take out and put in as fast as one run of bytes (266 to 390
GB/s over NVLink from 256 bytes a row on): nothing is packed.

Every rank writes into the others' memory (see mailbox.py). No acknowledgement is needed: what a rank sends for a block
it computes from that block's predecessor, for which it needed the output of every other rank, which has therefore
read all that it had been sent; and the output goes to a rank that has sent its queries, so is done with the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from ..wanvideo.attention import AttentionKernel
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
    """What lies where in a mailbox: keys, values, queries, output, each [B, tokens, heads, head_dim].

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

    @property
    def tokens(self) -> int:
        """Of all ranks."""
        return sum(self.lengths)

    def slices(self, rank: int) -> list[tuple[int, int]]:
        """Start and length of the slices of heads of `rank`, counted from its first head."""
        counts = self.cuts[rank]
        return list(zip(accumulate(counts, initial=0), counts))  # noqa: B905 (accumulate gives the end too)

    def keys(self, rank: int) -> int:
        """The byte in the memory of `rank` at which the keys of its heads begin."""
        return 0

    def values(self, rank: int) -> int:
        """The same for the values."""
        return self._all_heads(rank)

    def queries(self, rank: int, part: int) -> int:
        """The same for the queries of one slice of its heads."""
        return 2 * self._all_heads(rank) + self.nbytes_of(self.batch * self.tokens * self.slices(rank)[part][0])

    def output(self, rank: int) -> int:
        """The same for the output of all heads for its tokens."""
        return 3 * self._all_heads(rank)

    def letters(self, kind: str, sender: int, receiver: int) -> list[Letter]:
        """What `receiver` gets of the queries, keys or values ("q", "k", "v") [B, n, heads, head_dim] of `sender`."""
        before, n = sum(self.lengths[:sender]), self.lengths[sender]
        vector, row = self.nbytes_of(1), self.nbytes_of(sum(self.heads))
        letters = []
        for base, first, count, channel in self._parcels(kind, receiver):
            width = count * vector
            letters.append(
                Letter(
                    receiver,
                    channel,
                    (self.batch, n, width),
                    start=(sum(self.heads[:receiver]) + first) * vector,
                    strides=(n * row, row),
                    offset=base + before * width,
                    strides_there=(self.tokens * width, width),
                    packed=base + self.batch * before * width,
                )
            )
        return letters

    def output_letter(self, part: int, sender: int, receiver: int) -> Letter:
        """What `receiver` gets of the output [B, tokens of all, heads of slice `part`, head_dim] of `sender`."""
        first, count = self.slices(sender)[part]
        first += sum(self.heads[:sender])
        n, vector, row = self.lengths[receiver], self.nbytes_of(1), self.nbytes_of(sum(self.heads))
        width = count * vector
        return Letter(
            receiver,
            _OUTPUT + part,
            (self.batch, n, width),
            start=sum(self.lengths[:receiver]) * width,
            strides=(self.tokens * width, width),
            offset=self.output(receiver) + first * vector,
            strides_there=(n * row, row),
            packed=self.output(receiver) + self.batch * n * first * vector,
        )

    def nbytes_of(self, vectors: int) -> int:
        """Bytes of so many vectors of a head."""
        return vectors * self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that the fullest memory needs."""
        own = (self.nbytes_of(self.batch * length * sum(self.heads)) for length in self.lengths)
        return max(self.output(rank) + size for rank, size in enumerate(own))

    def _parcels(self, kind: str, receiver: int) -> Iterator[tuple[int, int, int, int]]:
        """Into which byte, which of its heads, from which on and how many, on which channel."""
        if kind == "q":
            for part, (start, count) in enumerate(self.slices(receiver)):
                yield self.queries(receiver, part), start, count, _QUERIES + part
        elif kind == "k":
            yield self.keys(receiver), 0, self.heads[receiver], _KEYS
        else:
            yield self.values(receiver), 0, self.heads[receiver], _VALUES

    def _all_heads(self, rank: int) -> int:
        """Bytes of the keys, values or queries."""
        size = self.nbytes_of(self.batch * self.tokens * self.heads[rank])
        return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Arrivals:
    """Where in this rank's mailbox lies what all ranks send it.

    Args:
        keys, values: [B, tokens of all, own heads, head_dim].
        queries: the same for each slice of the own heads.
        output: [B, own tokens, all heads, head_dim].
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: tuple[torch.Tensor, ...]
    output: torch.Tensor


@dataclass(frozen=True)
class Mail:
    """What one rank sends for each block, and what it waits for.

    Args:
        inputs: of queries, keys and values ("q", "k", "v").
        outputs: of each slice of its heads.
        awaited: before each slice of its heads.
        awaited_output: at the end.
    """

    inputs: dict[str, list[Letter]]
    outputs: list[list[Letter]]
    awaited: list[list[Letter]]
    awaited_output: list[Letter]

    @classmethod
    def of(cls, layout: Layout, place: int, order: Sequence[int]) -> Mail:
        """That of the rank at `place`, which takes the ranks in this order. What is needed first sets out first."""

        def of_channel(letter: Letter) -> int:
            return letter.channel

        sent = {
            kind: sorted((x for rank in order for x in layout.letters(kind, place, rank)), key=of_channel)
            for kind in "vkq"
        }
        parts = range(len(layout.slices(place)))
        coming = [replace(x, rank=rank) for kind in "vkq" for rank in order for x in layout.letters(kind, rank, place)]
        awaited = [[x for x in coming if x.channel == _QUERIES + part] for part in parts]
        if awaited:
            awaited[0] = [x for x in coming if x.channel in (_VALUES, _KEYS)] + awaited[0]
        return cls(
            sent,
            [[layout.output_letter(part, place, rank) for rank in order] for part in parts],
            awaited,
            [
                replace(layout.output_letter(part, rank, place), rank=rank)
                for part in range(SLICES)
                for rank in order
                if part < len(layout.slices(rank))
            ],
        )


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
        ranks = len(self.lengths)  # an order of its own for each, so that not all send to one at a time; itself last
        self.order = [(self.place + i) % ranks for i in range(1, ranks + 1)]
        self._layout: Layout | None = None
        self._given: tuple[int, int, torch.dtype] | None = None  # of what the layout depends on, what can change
        self._announced: dict[str, torch.Tensor] = {}

    def announce(self, kind: str, x: torch.Tensor) -> None:
        """Send x [B, n, heads, head_dim], the queries, keys or values ("q", "k", "v") of this rank's tokens."""
        self._prepare(x)
        x = self._announced[kind] = x.contiguous()  # not given back before it has left
        self.mailbox.send(self._mail.inputs[kind], x)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, n, heads, head_dim] of this rank's tokens; returns their attention output, same shape.

        It lies where the next block's will.
        """
        for kind, x in (("v", v), ("k", k), ("q", q)):
            if kind not in self._announced:
                self.announce(kind, x)
        arrivals, mail, among = self._arrivals, self._mail, self.mailbox.members
        for part, (start, count) in enumerate(self._layout.slices(self.place)):
            with standing(LATER_SLICES if part else ALL_TO_ALL, among):
                self.mailbox.wait(mail.awaited[part])
            heads = slice(start, start + count)
            out = self.kernel(arrivals.queries[part], arrivals.keys[:, :, heads], arrivals.values[:, :, heads])
            self._send_output(part, out.contiguous())
        with standing(ALL_TO_ALL, among):
            self.mailbox.wait(mail.awaited_output)
        # who has sent its output has had all of this rank's queries, keys and values
        self._announced.clear()
        return arrivals.output

    def _send_output(self, part: int, out: torch.Tensor) -> None:
        self.mailbox.hold(out)
        self.mailbox.send(self._mail.outputs[part], out)

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
        self._mail = Mail.of(layout, self.place, self.order)

    def _all_arrivals(self, layout: Layout) -> Arrivals:
        me = self.place

        def whole(offset: int, tokens: int, heads: int) -> torch.Tensor:
            return self.mailbox.own(offset, (layout.batch, tokens, heads, layout.head_dim), layout.dtype)

        return Arrivals(
            whole(layout.keys(me), layout.tokens, layout.heads[me]),
            whole(layout.values(me), layout.tokens, layout.heads[me]),
            tuple(
                whole(layout.queries(me, part), layout.tokens, count)
                for part, (_, count) in enumerate(layout.slices(me))
            ),
            whole(layout.output(me), layout.lengths[me], sum(layout.heads)),
        )
