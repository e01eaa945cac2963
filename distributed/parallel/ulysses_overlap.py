"""Ulysses' exchange hidden behind computation: exact self-attention over the ranks of one Ulysses group.

The exchange of sequence_attention.py waits twice in each block: for queries, keys and values, and for the output. Here
queries, keys and values each set out as soon as they are computed, while the product of the next one runs. Attention
is computed in slices of heads: while one slice is computed, the inputs of the next slice arrive, and the output of the
slice before leaves. A rank waits only for the last output, and for the first queries where they travel for longer than
a product takes. The bytes that travel are the same.

Every rank writes into the other ranks' memory (see peer_memory.py). Receivers need not acknowledge that they have read
a transfer before the next block's transfer replaces it. Queries, keys and values: a rank computes them from the output
of the block before, for which it needed the output of every other rank; so every other rank had read its inputs by
then. Output: it goes to a rank that has sent the queries of this block, and so has read the output of the block before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...wanvideo.attention.kernels import AttentionKernel
from ..comm.peer_memory import PeerMemory
from ..comm.timing import ALL_TO_ALL, LATER_SLICES, measure_wait
from .sequence_group import SequenceGroup
from .ulysses_layout import TransferSchedule, UlyssesLayout, cut, cut_for_two_hops


@dataclass(frozen=True)
class Arrivals:
    """The parts of this rank's memory into which all ranks send.

    Args:
        slices: queries, keys and values [B, tokens of all, heads, head_dim] of each slice of the own heads.
        output: [B, own tokens, all heads, head_dim].
    """

    slices: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    output: torch.Tensor


class OverlappedAttention:
    """Self-attention over the shards of an Ulysses group; all ranks of it call it for the same blocks in turn.

    Args:
        tokens: length of the whole sequence.
        heads: heads of the model.
    """

    def __init__(self, group: SequenceGroup, kernel: AttentionKernel, tokens: int, heads: int, memory: PeerMemory):
        self.kernel, self.memory, self.index = kernel, memory, group.ulysses_index
        self.lengths = tuple(group.lengths(tokens))
        self.heads = tuple(group.heads(heads))
        ranks = len(self.lengths)  # each rank has an order of its own, itself last: not all send to one rank at a time
        self.order = [(self.index + i) % ranks for i in range(1, ranks + 1)]
        self._given: tuple[int, int, torch.dtype] | None = None  # what can change of what the layout depends on
        self._announced: dict[str, torch.Tensor] = {}

    def reserve(self, batch: int, head_dim: int, dtype: torch.dtype) -> None:
        """Have memory for the exchange of queries, keys and values [batch, n, heads, head_dim]; a collective call.

        Raises:
            HostMemoryError: on every rank. The host has no room for transfers that go through its memory.
        """
        self.memory.reserve(self._layout_of(batch, head_dim, dtype).nbytes)

    def announce(self, kind: str, x: torch.Tensor) -> None:
        """Send x [B, n, heads, head_dim], the queries, keys or values ("q", "k", "v") of this rank's tokens."""
        self._prepare(len(x), x.shape[-1], x.dtype)
        x = self._announced[kind] = x.contiguous()  # not given back before it has left
        for sent, transfers in self._schedule.sent[kind]:
            self.memory.put(transfers, self._announced[sent])

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of q, k, v [B, n, heads, head_dim], those of this rank's tokens; returns the output, same shape.

        The output lies in peer memory, where the next block's output will replace it.
        """
        for kind, x in (("v", v), ("k", k), ("q", q)):
            if kind not in self._announced:
                self.announce(kind, x)
        arrivals, schedule, among = self._arrivals, self._schedule, self.memory.members
        for part, inputs in enumerate(arrivals.slices):
            with measure_wait(LATER_SLICES if part else ALL_TO_ALL, among):
                self.memory.wait_signal(schedule.awaited[part])
            self._send_output(part, self.kernel(*inputs).contiguous())
        with measure_wait(ALL_TO_ALL, among):
            self.memory.wait_signal(schedule.awaited_output)
        # a rank that has sent its output has received all of this rank's queries, keys and values
        self._announced.clear()
        return arrivals.output

    def _send_output(self, part: int, out: torch.Tensor) -> None:
        self.memory.hold(out)
        self.memory.put(self._schedule.sent_output[part], out)

    def _prepare(self, batch: int, head_dim: int, dtype: torch.dtype) -> None:
        given = batch, head_dim, dtype
        if given == self._given:
            return
        layout = self._layout_of(*given)
        with measure_wait(ALL_TO_ALL, self.memory.members):
            self.memory.arrange(layout, layout.nbytes)
        self._given = given
        self._arrivals = self._all_arrivals(layout)
        self._schedule = TransferSchedule.of(layout, self.index, self.order)

    def _layout_of(self, batch: int, head_dim: int, dtype: torch.dtype) -> UlyssesLayout:
        far = self.memory.hops > 1
        cut_heads, tokens = cut_for_two_hops if far else cut, sum(self.lengths)
        ranks = zip(self.heads, self.memory.processors, strict=True)
        cuts = tuple(cut_heads(heads, tokens, batch, processors) for heads, processors in ranks)
        return UlyssesLayout(self.lengths, cuts, batch, head_dim, dtype, apart=far)

    def _all_arrivals(self, layout: UlyssesLayout) -> Arrivals:
        me = self.index

        def own(offset: int, tokens: int, heads: int) -> torch.Tensor:
            return self.memory.own(offset, (layout.batch, tokens, heads, layout.head_dim), layout.dtype)

        def of_slice(kind: str, start: int, count: int) -> torch.Tensor:
            """[B, tokens, heads of the slice, head_dim], among the heads that travel together."""
            first, heads = next(x for x in reversed(layout.head_runs(kind, me)) if x[0] <= start)
            together = own(layout.offset(kind, me, first), layout.tokens, heads)
            return together[:, :, start - first : start - first + count]

        return Arrivals(
            tuple((of_slice("q", *at), of_slice("k", *at), of_slice("v", *at)) for at in layout.slices(me)),
            own(layout.output_offset(me), layout.lengths[me], sum(layout.heads)),
        )
