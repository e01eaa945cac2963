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
from itertools import accumulate

import torch

from ..wanvideo.attention import AttentionKernel
from .heads import gather_heads, scatter_heads
from .mailbox import Mailbox
from .plan import shares
from .sequence import SequenceGroup
from .stopwatch import ALL_TO_ALL, LATER_SLICES, standing

SLICES = 2
"""Slices of a rank's heads. More hide more and make attention kernels smaller."""

_KEYS, _VALUES, _QUERIES, _OUTPUT = 0, 1, 2, 2 + SLICES  # channels; queries and output have one for each slice
_ALIGN = 256


@dataclass(frozen=True)
class Layout:
    """What lies where in a mailbox: keys, values, queries, output. Tokens lead, so that what all ranks send is one
    sequence.

    Args:
        lengths: tokens of each rank.
        heads: heads of each rank.
    """

    lengths: tuple[int, ...]
    heads: tuple[int, ...]
    batch: int
    head_dim: int
    dtype: torch.dtype

    def slices(self, rank: int) -> list[tuple[int, int]]:
        """Start and length of the slices of heads of `rank`, counted from its first head."""
        counts = [count for count in shares(self.heads[rank], SLICES) if count]
        return list(zip(accumulate(counts, initial=0), counts))  # noqa: B905 (accumulate gives the end too)

    def keys(self, rank: int, sender: int) -> int:
        """The byte in the memory of `rank` at which the keys of the tokens of `sender` begin."""
        return self._size(sum(self.lengths[:sender]), self.heads[rank])

    def values(self, rank: int, sender: int) -> int:
        """The same for the values."""
        return self._sequence(rank) + self.keys(rank, sender)

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
class Parcel:
    """Some heads of all of a rank's tokens on their way: to whom, how many, to which byte, on which channel."""

    rank: int
    heads: int
    offset: int
    channel: int


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
        self._layout: Layout | None = None
        self._announced: set[str] = set()
        self._packed: dict[str, torch.Tensor] = {}

    def announce(self, kind: str, x: torch.Tensor) -> None:
        """Send x [B, n, heads, head_dim], the queries, keys or values ("q", "k", "v") of this rank's tokens."""
        self._prepare(x)
        self._announced.add(kind)
        parcels = self._parcels(kind)
        n, batch, dim = self.lengths[self.place], *x.shape[::3]
        outgoing = self._outgoing(kind, x).split([n * batch * dim * parcel.heads for parcel in parcels])
        shapes = [(n, batch, parcel.heads, dim) for parcel in parcels]
        parts = [
            self.mailbox.own(parcel.offset, shape, x.dtype) if parcel.rank == self.place else part.view(shape)
            for parcel, part, shape in zip(parcels, outgoing, shapes, strict=True)
        ]
        scatter_heads(x, parts)
        ranks = len(self.lengths)  # first what is needed first, and not all ranks to the same one at a time
        order = sorted(range(len(parcels)), key=lambda i: (parcels[i].channel, (parcels[i].rank - self.place) % ranks))
        for i in order:
            if parcels[i].rank != self.place:
                self.mailbox.send(parcels[i].rank, parcels[i].offset, parts[i], parcels[i].channel)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, n, heads, head_dim] of this rank's tokens; returns their attention output, same shape."""
        for kind, x in (("v", v), ("k", k), ("q", q)):
            if kind not in self._announced:
                self.announce(kind, x)
        self._announced.clear()
        layout, place = self._layout, self.place
        with standing(ALL_TO_ALL, self.mailbox.group):
            self._await(_KEYS)
            self._await(_VALUES)
        keys = self._sequence(layout.keys(place, 0), self.heads[place])
        values = self._sequence(layout.values(place, 0), self.heads[place])
        outputs = []
        for part, (start, count) in enumerate(layout.slices(place)):
            with standing(LATER_SLICES if part else ALL_TO_ALL, self.mailbox.group):
                self._await(_QUERIES + part)
            queries, heads = self._sequence(layout.queries(place, part, 0), count), slice(start, start + count)
            out = self.kernel(queries, keys[:, :, heads], values[:, :, heads])
            outputs.append(out.transpose(0, 1).contiguous())
            self._send_output(part, outputs[-1])
        return self._output(q, outputs)

    def _prepare(self, x: torch.Tensor) -> None:
        layout = Layout(self.lengths, self.heads, len(x), x.shape[-1], x.dtype)
        if layout != self._layout:
            with standing(ALL_TO_ALL, self.mailbox.group):
                self.mailbox.arrange(layout, layout.nbytes)
            self._layout = layout
            self._packed.clear()

    def _parcels(self, kind: str) -> list[Parcel]:
        """What this rank sends of its queries, keys or values, in the order of the heads."""
        layout, ranks = self._layout, range(len(self.lengths))
        if kind == "k":
            return [Parcel(r, self.heads[r], layout.keys(r, self.place), _KEYS) for r in ranks]
        if kind == "v":
            return [Parcel(r, self.heads[r], layout.values(r, self.place), _VALUES) for r in ranks]
        return [
            Parcel(r, count, layout.queries(r, part, self.place), _QUERIES + part)
            for r in ranks
            for part, (_, count) in enumerate(layout.slices(r))
        ]

    def _outgoing(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """Where x lies while the copy engines fetch it; they have done so when its like of the next block comes."""
        if kind not in self._packed:
            self._packed[kind] = x.new_empty(x.numel())
        return self._packed[kind]

    def _this_one_last(self) -> Iterator[int]:
        """The ranks in an order of its own for each of them, so that not all send to one at a time."""
        ranks = len(self.lengths)
        return ((self.place + i) % ranks for i in range(1, ranks + 1))

    def _send_output(self, part: int, output: torch.Tensor) -> None:
        """Output [tokens, B, some heads, head_dim] of all tokens to those who have them."""
        rows = output.split(self.lengths)
        for rank in self._this_one_last():
            if rank != self.place:
                self.mailbox.send(rank, self._layout.output(rank, part, self.place), rows[rank], _OUTPUT + part)

    def _output(self, q: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
        """What all ranks have computed for this rank's tokens, in the shape of q."""
        layout, place, parts = self._layout, self.place, []
        with standing(ALL_TO_ALL, self.mailbox.group):
            for sender in range(len(self.lengths)):
                for part, (_, count) in enumerate(layout.slices(sender)):
                    if sender == place:
                        parts.append(outputs[part].split(self.lengths)[place])
                    else:
                        self.mailbox.wait(sender, _OUTPUT + part)
                        shape = (self.lengths[place], layout.batch, count, layout.head_dim)
                        parts.append(self.mailbox.own(layout.output(place, part, sender), shape, layout.dtype))
        result = torch.empty_like(q, memory_format=torch.contiguous_format)
        gather_heads(parts, result)
        return result

    def _sequence(self, offset: int, heads: int) -> torch.Tensor:
        """[B, tokens, heads, head_dim] out of this rank's memory."""
        shape = (sum(self.lengths), self._layout.batch, heads, self._layout.head_dim)
        return self.mailbox.own(offset, shape, self._layout.dtype).transpose(0, 1)

    def _await(self, channel: int) -> None:
        for rank in self._this_one_last():
            if rank != self.place:
                self.mailbox.wait(rank, channel)
