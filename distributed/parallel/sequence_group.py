"""The ranks that share a token sequence: which tokens and heads each of them has, and their process groups.

Nothing is padded: ranks may have uneven numbers of tokens and of heads. Yunchang's process groups are not used: they
are runs of consecutive ranks, and where tensor-parallel ranks lie between the ranks of a sequence, these are not
consecutive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
import torch.distributed as dist

from ...wanvideo.base.user_error import UserError
from ...wanvideo.model.layers import OverSequence
from ..comm import timing
from ..plan.degrees import SequenceDegrees, head_speeds, shares
from ..shm import signs
from ..shm.signs import Mark


class MissingPackage(UserError, RuntimeError):
    """A package that several workers need is not installed. The text has the line that installs it."""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence, as one of them sees them.

    Shard i of the sequence belongs to rank `ranks[i]`; an Ulysses group is a run of `ranks`, and a ring goes
    through the ranks that are equally far along in their Ulysses groups.

    Attributes:
        index: which shard this rank has.
        ulysses, ring: the process groups of this rank; None where the degree is 1.
        speeds: the speed of each rank of the group, in proportion to which ranks share tokens and heads; empty where
            all ranks are alike.
    """

    degrees: SequenceDegrees
    ranks: tuple[int, ...]
    index: int
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    speeds: tuple[int, ...] = ()

    @property
    def ulysses_index(self) -> int:
        """How far along this rank is in its Ulysses group."""
        return self.index % self.degrees.ulysses

    @property
    def ring_index(self) -> int:
        """How far along this rank is in its ring."""
        return self.index // self.degrees.ulysses

    def shard(self, tokens: int) -> tuple[int, int]:
        """Start and stop of this rank's tokens."""
        lengths = self.lengths(tokens)
        start = sum(lengths[: self.index])
        return start, start + lengths[self.index]

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each rank."""
        return shares(tokens, self.degrees.ranks, self.speeds)

    def heads(self, heads: int) -> list[int]:
        """Heads of each rank of an Ulysses group."""
        return shares(heads, self.degrees.ulysses, head_speeds(self.degrees, self.speeds))


def group_of(degrees: SequenceDegrees, rank: int, groups: Sequence[tuple[int, ...]]) -> SequenceGroup:
    """The group among `groups` that has `rank`, without process groups."""
    ranks = next(group for group in groups if rank in group)
    return SequenceGroup(degrees, ranks, ranks.index(rank))


def join_group(degrees: SequenceDegrees, rank: int, groups: Sequence[tuple[int, ...]]) -> SequenceGroup:
    """Make the process groups of `degrees` (a collective call: every rank names the same `groups`).

    Raises:
        MissingPackage: yunchang is not installed, and there is a ring.
    """
    group = group_of(degrees, rank, groups)
    if degrees.ring > 1:
        import_yunchang("ring.utils")
    ulysses = [members for ranks in groups for members in degrees.ulysses_groups(ranks)]
    ring = [members for ranks in groups for members in degrees.ring_groups(ranks)]
    return replace(group, ulysses=own_process_group(ulysses, rank), ring=own_process_group(ring, rank))


def own_process_group(groups: Iterable[Sequence[int]], rank: int) -> dist.ProcessGroup | None:
    """Make a process group of each of `groups`, and return the process group of `rank`; None where `rank` is alone.

    A collective call: torch wants every rank to make all groups, and in the same order.
    """
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            with signs.marked(Mark.WAITING):
                group = dist.new_group(list(ranks))
            own = group if rank in ranks else own
    return own


def leave_groups(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """End process groups of this rank (their other ranks do the same)."""
    for group in groups:
        if group is not None:
            dist.destroy_process_group(group)


def over_sequence(*groups: dist.ProcessGroup | None) -> OverSequence:
    """Sums and maxima over all ranks of a sequence, whose process groups are an Ulysses group and a ring."""

    def reduce(op: dist.ReduceOp.RedOpType, x: torch.Tensor) -> torch.Tensor:
        for group in groups:
            if group is not None:
                with timing.measure_wait(timing.SUMS, group):
                    dist.all_reduce(x, op, group)
        return x

    return OverSequence(partial(reduce, dist.ReduceOp.SUM), partial(reduce, dist.ReduceOp.MAX))


def import_yunchang(module: str) -> ModuleType:
    """A module of yunchang, which only rings need.

    Raises:
        MissingPackage: yunchang is not installed.
    """
    try:
        return import_module(f"yunchang.{module}")
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{error.name} is not installed, and a ring of workers needs it. "
            "Run ./install_xdit_usp.sh in the WanParallel folder, or set ring_degree to 1."
        ) from error
