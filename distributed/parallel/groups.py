"""What a rank belongs to under the plan at hand: its part of the matrices and of the blocks, and the groups of ranks
that share a sequence, with how they see each other's tokens.

Groups are made when a model first needs them, and those of a sequence are kept for when an earlier plan returns. All
ranks make and leave them together.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ...wanvideo.base.grid import Grid
from ...wanvideo.model.layers import OverSequence, SelfAttention
from ...wanvideo.model.model import WanModel
from ..comm.peer_memory import Mailbox
from ..comm.peer_memory_cuda import open_mailbox
from ..plan.degrees import ParallelPlan, SequenceDegrees
from ..protocol.specs import PoolSettings
from ..shm.pinned import HostMemoryError
from . import xfuser_backend
from .pipeline import Stage
from .sequence import (
    NativeAttention,
    SequenceGroup,
    join_group,
    leave_groups,
    over_sequence,
    own_process_group,
    place_in,
)
from .tensor import TensorShard
from .ulysses_overlap import OverlappedAttention

log = logging.getLogger(__name__)


class Membership:
    """The groups of one rank. Methods that make or leave groups are collective calls.

    Attributes:
        shard, stage: the rank's part of the matrices and of the blocks, with their process groups.
        groups: for sequences, by their degrees; those of the models that have been joined.
    """

    def __init__(self, rank: int, settings: PoolSettings, device: torch.device):
        self.rank, self.settings, self.device = rank, settings, device
        self.place = settings.plan.place(rank)
        self.shard, self.stage = self._join_divided()
        self.groups: dict[SequenceDegrees, SequenceGroup] = {}
        self.mailboxes: dict[SequenceDegrees, Mailbox] = {}
        self._xfuser_groups: dict[SequenceDegrees, xfuser_backend.XfuserGroup] = {}
        self._joined: dict[Hashable, tuple[SequenceGroup, Mailbox | None]] = {}  # by degrees and members

    @property
    def plan(self) -> ParallelPlan:
        return self.settings.plan

    def join(self, num_heads: int) -> None:
        """Make the process groups that a model of `num_heads` heads will use, for each size of group."""
        plan = self.plan
        for ranks in sorted({plan.sequence_ranks, plan.sequence_ranks * plan.data_parallel}):
            degrees, members = plan.sequence_degrees(num_heads, ranks), plan.sequence_groups(ranks)
            if degrees in self.groups:
                continue
            if self.settings.usp_backend == "xfuser" and degrees.ranks > 1:
                self._xfuser_groups[degrees] = xfuser_backend.join_group(degrees, self.device)
                self.groups[degrees] = place_in(degrees, self.rank, members)
            else:
                group, mailbox = self._join_sequence(degrees, members)
                self.groups[degrees] = replace(group, speeds=plan.sequence_speeds(group.ranks))
                if mailbox is not None:
                    self.mailboxes[degrees] = mailbox

    def follow(self, settings: PoolSettings) -> None:
        """Take another plan. The groups of models must be joined again; `rejoin` where it divides models otherwise."""
        self.settings, self.place = settings, settings.plan.place(self.rank)
        self.close_mailboxes()
        self.groups.clear()
        self.mailboxes.clear()

    def rejoin(self, further: Iterable[dist.ProcessGroup]) -> None:
        """Leave all process groups, and `further` ones that others made, and take this rank's part under the plan."""
        leave_groups([*self._process_groups(), *further])
        self._joined.clear()
        self.shard, self.stage = self._join_divided()

    def close_mailboxes(self) -> None:
        """Give their memory back; they can be used again."""
        for mailbox in self.mailboxes.values():
            mailbox.close()

    def heads(self, model: WanModel) -> int:
        """Heads of this rank's part of a model, over its whole sequence group."""
        return model.config.num_heads // self.shard.size

    def attention(self, group: SequenceGroup, model: WanModel, grid: Grid, batch: int) -> SelfAttention:
        """Exact self-attention of this rank's tokens to those of the whole group, for so many items at a time."""
        kernel, heads = model.self_kernel, self.heads(model)
        if group.degrees.ranks == 1:
            return kernel
        if group.degrees in self._xfuser_groups:
            xfuser_group = self._xfuser_groups[group.degrees]
            return xfuser_backend.XfuserAttention(xfuser_group, kernel, grid.tokens, heads)
        if group.degrees in self.mailboxes:
            attend = OverlappedAttention(group, kernel, grid.tokens, heads, self.mailboxes[group.degrees])
            try:
                attend.reserve(batch, model.config.head_dim, model.compute_dtype)
                return attend
            except HostMemoryError as error:
                self._leave_mailbox(group.degrees)
                log.warning("%s Until the workers start anew, exchanges go through NCCL one after the other.", error)
        return NativeAttention(group, kernel, grid.tokens, heads, self.settings.overlap)

    def _leave_mailbox(self, degrees: SequenceDegrees) -> None:
        mailbox = self.mailboxes.pop(degrees)
        self._joined = {key: (group, None if box is mailbox else box) for key, (group, box) in self._joined.items()}

    def over_sequence(self, group: SequenceGroup) -> OverSequence | None:
        """Sums and maxima over the ranks of a group; None where there is one."""
        joined = self._xfuser_groups.get(group.degrees, group)
        return over_sequence(joined.ulysses, joined.ring) if group.degrees.ranks > 1 else None

    def _join_divided(self) -> tuple[TensorShard, Stage]:
        """This rank's part of the matrices and of the blocks, with the process groups that belong to them."""
        plan = self.plan
        groups = plan.tensor_groups()
        tensor_group = own_process_group(groups, self.rank)
        overlapped = own_process_group(groups, self.rank) if self.settings.overlap else None
        pipelines = plan.pipelines()
        ranks = next(ranks for ranks in pipelines if self.rank in ranks)
        return (
            TensorShard(plan.tensor_parallel, self.place.tensor, tensor_group, overlapped),
            Stage(self.place.stage, ranks, own_process_group(pipelines, self.rank)),
        )

    def _join_sequence(
        self, degrees: SequenceDegrees, members: Sequence[tuple[int, ...]]
    ) -> tuple[SequenceGroup, Mailbox | None]:
        """The process groups of `degrees` for these ranks; those of an earlier plan are kept for when it returns."""
        key = (degrees, *members)
        if key not in self._joined:
            group, mailbox = join_group(degrees, self.rank, members), None
            if self.settings.overlap and degrees.ulysses > 1 and degrees.ring == 1:
                mailbox = open_mailbox(group.ulysses, self.device)
            self._joined[key] = group, mailbox
        return self._joined[key]

    def _process_groups(self) -> Iterator[dist.ProcessGroup | None]:
        for group, _ in self._joined.values():
            yield from (group.ulysses, group.ring)
        yield from (self.shard.group, self.shard.overlapped, self.stage.group)
