"""How one forward computes attention, as plain data without torch, so that every process can pass it on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .user_error import UserError

BLOCK = 64
"""Tokens of a block, the unit in which sparse attention chooses keys (Sol-Attn, arXiv 2607.24027)."""
_EVER = 1e9
"""A sigma above those of every sampler."""
_OVERHEAD, _PER_KEPT, _EXTRA = 0.056, 2.11, 0.075
"""The time of sparse attention relative to FlashAttention-3: a constant, a part in proportion to the share of the key
blocks that are kept, and a constant for extra tokens, however many. One H200, 75,600 tokens, 40 heads of 128: 46 ms
with 10 % kept, 83 with 20 %, 119 with 30 %, 191 with 50 %, where FlashAttention-3 takes 172; 64 to 256 extra tokens
take 12.5."""
_BYTES = 740
"""Bytes for each token and head: what the kernel rounds, and what it sums up and sorts of it."""


class SparseError(UserError, ValueError):
    """Sparse attention cannot run as it is set. The text says why, and which settings can."""


@dataclass(frozen=True)
class SparseSettings:
    """When self-attention is sparse, and how much of it is then computed exactly.

    A block of 64 queries attends to chosen blocks of 64 keys exactly, and to every other block through one pooled term.
    The blocks of keys next to its own are always among the chosen.

    Args:
        tau: a block of keys is chosen whose score lies above the mean by more than so many standard deviations.
        keep: the share of the blocks of keys that is chosen instead, from 0 to 1; 0 leaves the choice to `tau`.
        extra_tokens: keys of other blocks, those of the highest scores, to which each block of queries attends exactly
            too.
        sigma_start, sigma_end: attention is sparse in steps whose sigma lies from `sigma_end` to `sigma_start`.
        dense_blocks: transformer blocks whose self-attention is always dense.
        min_tokens: shorter sequences are dense.
    """

    tau: float = 1.3
    keep: float = 0.0
    extra_tokens: int = 256
    sigma_start: float = _EVER
    sigma_end: float = 0.0
    dense_blocks: tuple[int, ...] = ()
    min_tokens: int = 12288

    def validate(self, num_layers: int | None = None) -> None:
        """Check the settings, and `dense_blocks` against the number of blocks of a model where this is known.

        Raises:
            SparseError: one of them is out of its range.
        """
        if not (math.isfinite(self.tau) and 0 <= self.tau <= 4):
            raise SparseError(f"tau is {self.tau:g}, and sparse attention takes 0 to 4. Use 1.3, the default.")
        if not 0 <= self.keep < 1:
            raise SparseError(
                f"keep_percent is {100 * self.keep:g}, and sparse attention keeps more than 0 % and less than 100 % of "
                "the key blocks. Use 0.5 to 95, or leave the sparse attention node out for dense attention."
            )
        if self.extra_tokens not in range(0, 257, BLOCK):
            raise SparseError(
                f"extra_tokens is {self.extra_tokens}, which the kernel cannot take. Use 0, 64, 128, 192 or 256."
            )
        if not (math.isfinite(self.sigma_start) and math.isfinite(self.sigma_end)):
            raise SparseError(
                "The steps in which attention is sparse have no beginning or no end. Use a start_percent and an "
                "end_percent from 0 to 1."
            )
        if self.min_tokens < 0:
            raise SparseError(f"min_tokens is {self.min_tokens}. Use 0 or more.")
        beyond = [block for block in self.dense_blocks if num_layers is not None and not 0 <= block < num_layers]
        if beyond:
            raise SparseError(
                f"dense_blocks names block {beyond[0]}, but this model has {num_layers} blocks. "
                f"Use numbers from 0 to {(num_layers or 1) - 1}."
            )

    def why_dense(self, tokens: int, sigma: float | None) -> str:
        """Why a forward of `tokens` tokens at `sigma` is dense in all blocks, in words; "" where it is not.

        Args:
            sigma: of the step; None where the sampler does not say, which counts as within the range.
        """
        if tokens < self.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens {self.min_tokens}"
        if sigma is not None and not self.sigma_end <= sigma <= self.sigma_start:
            return f"sigma {sigma:.3g} is outside of {self.sigma_end:.3g} to {self.sigma_start:.3g}"
        return ""

    @property
    def expected_kept(self) -> float:
        """The share of the key blocks that is expected to be chosen: `keep`, or that of scores with a normal
        distribution."""
        return self.keep or 0.5 * math.erfc(self.tau / math.sqrt(2))

    def cost(self, num_layers: int) -> float:
        """The expected time of all self-attention of a sparse forward, relative to dense attention."""
        sparse = _OVERHEAD + _PER_KEPT * self.expected_kept + (_EXTRA if self.extra_tokens else 0)
        dense = len(set(self.dense_blocks)) / num_layers
        return dense + (1 - dense) * sparse

    def describe(self) -> str:
        """The choice of key blocks, in words for a user."""
        kept = f"{100 * self.keep:g} %" if self.keep else f"tau {self.tau:g}, about {100 * self.expected_kept:.2g} %"
        more = f" and {self.extra_tokens} tokens" if self.extra_tokens else ""
        return f"{kept} of the key blocks{more} exact"


def blocks_in(text: str) -> tuple[int, ...]:
    """The numbers in a list such as `0, 1, 47-49`, in their order.

    Raises:
        SparseError: the text is no such list.
    """
    blocks: set[int] = set()
    for part in filter(None, re.split(r"[\s,;]+", re.sub(r"\s*-\s*", "-", text.strip()))):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if found is None:
            raise SparseError(
                f'dense_blocks has "{part[:40]}", which is no number of a block. Write it like 0, 1, 38-39.'
            )
        first, last = int(found[1]), int(found[2] or found[1])
        blocks.update(range(min(first, last), max(first, last) + 1))
    return tuple(sorted(blocks))


def sparse_bytes(tokens: int, heads: int) -> int:
    """Bytes that the sparse kernel takes beside queries, keys, values and output of `tokens` tokens and `heads` heads.

    Measured with comfy-kitchen 0.2.40 and extra tokens: 1.97 GiB with 75,600 tokens and 40 heads, 1.03 with 20, and
    0.85 GiB with 32,760 tokens and 40 heads; without extra tokens a quarter less.
    """
    return _BYTES * heads * tokens


@dataclass(frozen=True)
class AttentionChoice:
    """What a forward asks of attention beyond what its model has.

    Args:
        sparse: settings of sparse self-attention; None is dense.
        sigma: of the sampling step; None where the sampler does not say.
        kernel: the kernel of dense attention, self-attention and cross-attention; "" is the model's own.
    """

    sparse: SparseSettings | None = None
    sigma: float | None = None
    kernel: str = ""


PLAIN_ATTENTION = AttentionChoice()
