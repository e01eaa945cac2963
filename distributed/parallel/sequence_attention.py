"""Exact self-attention over a token sequence that several ranks share: Ulysses x ring, any lengths and heads.

Each rank holds a run of tokens with all heads. Within an Ulysses group one exchange gives each rank all tokens of the
group with a share of the heads instead. Around a ring the keys and values of the other groups pass by, and the outputs
of the blocks of keys are merged with float32 log-sum-exps. Nothing is padded: ranks may have uneven numbers of tokens
and of heads.

The ring's point-to-point exchange is yunchang's. Yunchang's attention wrappers are not used: their log-sum-exp is zero
or rounded for several kernels (see tests/distributed/parallel/test_sequence.py). Which rank has which tokens and heads
is in sequence_group.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ...wanvideo.attention.kernels import AttentionKernel
from ..comm import timing
from .sequence_group import (
    SequenceGroup,
    import_yunchang,
)


class SequenceAttention(ABC):
    """Self-attention of this rank's tokens over the shards of `group`, on torch.distributed.

    Before `attend` the ranks of an Ulysses group exchange heads for tokens, and after it tokens for heads.

    Args:
        tokens: length of the whole sequence.
        heads: heads of this rank's part of the model, over the whole group.
    """

    def __init__(self, group: SequenceGroup, tokens: int, heads: int):
        self.group = group
        self.lengths = group.lengths(tokens)
        self.heads = group.heads(heads)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, n, heads, head_dim] of this rank's tokens; returns their attention output, same shape."""
        if self.group.degrees.ulysses == 1:
            return self.attend(q, k, v)
        return self._heads_for_tokens(self.attend(*self._tokens_for_heads(q, k, v)))

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, tokens of the Ulysses group, share of the heads, head_dim]; returns the output, same shape."""

    def _ulysses_lengths(self, ring_index: int) -> list[int]:
        """Tokens of each rank of the Ulysses group at `ring_index`."""
        start = ring_index * self.group.degrees.ulysses
        return self.lengths[start : start + self.group.degrees.ulysses]

    def _tokens_for_heads(self, *qkv: torch.Tensor) -> list[torch.Tensor]:
        """Each [B, n, heads, d] becomes [B, tokens of the Ulysses group, share of the heads, d].

        All three travel in one exchange. Tokens lead in its layout, so that what arrives from the ranks in
        their order is the longer sequence without another copy.
        """
        batch, n, _, d = qkv[0].shape
        lengths = self._ulysses_lengths(self.group.ring_index)
        mine = self.heads[self.group.ulysses_index]
        token = batch * 3 * d  # elements of one token with one head
        outgoing = qkv[0].new_empty(n * token * sum(self.heads))
        for part, start, heads in _runs(outgoing, self.heads, n * token):
            packed = part.view(n, batch, 3, heads, d)
            for i, x in enumerate(qkv):
                packed[:, :, i].copy_(x[:, :, start : start + heads].transpose(0, 1))
        arrived = self._exchange(
            outgoing, [n * token * h for h in self.heads], [length * token * mine for length in lengths]
        )
        packed = arrived.view(sum(lengths), batch, 3, mine, d)
        return [packed[:, :, i].transpose(0, 1) for i in range(3)]

    def _heads_for_tokens(self, out: torch.Tensor) -> torch.Tensor:
        """The inverse of `_tokens_for_heads`: [B, tokens of the Ulysses group, share of the heads, d] to [B, n, heads,
        d]."""
        batch, _, mine, d = out.shape
        n = self._ulysses_lengths(self.group.ring_index)[self.group.ulysses_index]
        lengths = self._ulysses_lengths(self.group.ring_index)
        arrived = self._exchange(
            out.transpose(0, 1).contiguous().view(-1),
            [length * batch * mine * d for length in lengths],
            [n * batch * h * d for h in self.heads],
        )
        parts = [part.view(n, batch, h, d) for part, _, h in _runs(arrived, self.heads, n * batch * d)]
        return torch.cat(parts, dim=2).transpose(0, 1)

    def _exchange(self, outgoing: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        arrived = outgoing.new_empty(sum(received))
        with timing.measure_wait(timing.ALL_TO_ALL, self.group.ulysses):
            dist.all_to_all_single(arrived, outgoing, received, sent, group=self.group.ulysses)
        return arrived

    def passing(
        self, k: torch.Tensor, v: torch.Tensor, overlap: bool
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields the index in the ring, the keys and the values of every rank of the ring, this rank's first.

        Args:
            overlap: the next rank's keys and values travel while the caller works with those that were yielded.
        """
        steps = self.group.degrees.ring
        comm = import_yunchang("ring.utils").RingComm(self.group.ring)
        held, origin = torch.stack((k, v)), self.group.ring_index
        for step in range(steps - 1):
            following = (self.group.ring_index - step - 1) % steps
            incoming = held.new_empty(2, len(k), sum(self._ulysses_lengths(following)), *k.shape[2:])
            comm.send_recv(held, incoming)
            comm.commit()
            if not overlap:
                self._wait(comm)
            yield origin, held[0], held[1]
            if overlap:
                self._wait(comm)
            held, origin = incoming, following
        yield origin, held[0], held[1]

    def _wait(self, comm: Any) -> None:
        with timing.measure_wait(timing.RING, self.group.ring):
            comm.wait()


class NativeAttention(SequenceAttention):
    """Exact self-attention over the shards of `group`. Further arguments as those of `SequenceAttention`.

    Args:
        overlap: start each ring exchange before the block of keys that has arrived is computed.
    """

    def __init__(self, group: SequenceGroup, kernel: AttentionKernel, tokens: int, heads: int, overlap: bool = True):
        super().__init__(group, tokens, heads)
        self.kernel, self.overlap = kernel, overlap

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, tokens of the Ulysses group, share of the heads, head_dim]; returns the output, same shape."""
        if self.group.degrees.ring == 1:
            return self.kernel(q, k, v)
        passing = self.passing(k, v, self.overlap)
        _, keys, values = next(passing)
        merged = _Merge(*self.kernel.with_lse(q, keys, values))
        for _, keys, values in passing:
            merged.add(*self.kernel.with_lse(q, keys, values))
        return merged.out.to(q.dtype)


class _Merge:
    """Attention over keys that came in blocks, from the output and the log-sum-exp of each block."""

    def __init__(self, out: torch.Tensor, lse: torch.Tensor):
        self.out, self.lse = out.float(), _by_token(lse)

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Take in one more block: out [B, n, heads, d], lse [B, heads, n]."""
        share = torch.sigmoid(_by_token(lse) - self.lse)  # of the new block in the sum of both
        self.out = torch.lerp(self.out, out.float(), share)
        self.lse = torch.logaddexp(self.lse, _by_token(lse))


def _by_token(lse: torch.Tensor) -> torch.Tensor:
    return lse.float().transpose(1, 2).unsqueeze(-1)


def _runs(buffer: torch.Tensor, counts: list[int], size: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Cut a flat buffer into runs of count * size elements: (run, sum of the counts before, count)."""
    start = 0
    for count in counts:
        yield buffer[start * size : (start + count) * size], start, count
        start += count
