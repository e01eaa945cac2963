"""The groups of ranks to which a rank belongs under the present plan, and the rank's part of the model.

A group is made when a model first needs the group. Groups that share a sequence are kept when the plan changes, because
an earlier plan may return. All ranks make and leave groups together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ...wanvideo.model.layers import OverSequence
from ...wanvideo.model.model import WanModel
from ..comm.peer_memory import PeerMemory
from ..comm.peer_memory_cuda import open_peer_memory
from ..plan.degrees import ParallelPlan, SequenceDegrees
from ..protocol.specs import PoolSettings
from . import xfuser_backend
from .pipeline import Stage
from .sequence_group import SequenceGroup, group_of, join_group, leave_groups, over_sequence, own_process_group
from .tensor import TensorShard


class ParallelGroups:
    """The groups of one rank. Methods that make or leave groups are collective calls.

    Whatever the plan decides about the rank is owned by this object. The plan may change between two requests, so other
    objects ask this one at each request, and keep nothing of the answers.

    Attributes:
        settings: of the pool, with the present plan.
        coords: the rank's coordinates under the plan.
        shard, stage: the rank's part of the matrices and of the blocks, with their process groups.
        groups: the groups that share a sequence, by their degrees, of all models for which `join` was called.
        peer_memories: through which the ranks of an Ulysses group write into each other's memory, by the same degrees.
        xfuser_groups: xfuser's own groups, by the same degrees, where it is the backend.
    """

    def __init__(self, rank: int, settings: PoolSettings, device: torch.device):
        self.rank, self.settings, self.device = rank, settings, device
        self.coords = settings.plan.mesh.coords(rank)
        self.shard, self.stage = self._join_divided()
        self.groups: dict[SequenceDegrees, SequenceGroup] = {}
        self.peer_memories: dict[SequenceDegrees, PeerMemory] = {}
        self.xfuser_groups: dict[SequenceDegrees, xfuser_backend.XfuserGroup] = {}
        self._joined: dict[Hashable, tuple[SequenceGroup, PeerMemory | None]] = {}  # by degrees and members
        self._further: dict[Hashable, dist.ProcessGroup | None] = {}  # by purpose and members

    @property
    def plan(self) -> ParallelPlan:
        """The present degrees of parallelism."""
        return self.settings.plan

    def join(self, num_heads: int) -> None:
        """Make the process groups that a model of `num_heads` heads will use, for each size of group."""
        plan = self.plan
        for ranks in sorted({plan.sequence_ranks, plan.sequence_ranks * plan.data_parallel}):
            degrees, members = plan.sequence_degrees(num_heads, ranks), plan.sequence_groups(ranks)
            if degrees in self.groups:
                continue
            if self.settings.usp_backend == "xfuser" and degrees.ranks > 1:
                self.xfuser_groups[degrees] = xfuser_backend.join_group(degrees, self.device)
                self.groups[degrees] = group_of(degrees, self.rank, members)
            else:
                group, memory = self._join_sequence(degrees, members)
                self.groups[degrees] = replace(group, speeds=plan.sequence_speeds(group.ranks))
                if memory is not None:
                    self.peer_memories[degrees] = memory

    def set_plan(self, settings: PoolSettings) -> None:
        """Take another plan. Call `join` for each model again, and before that `rebuild` if the new plan divides models
        into other parts."""
        self.settings, self.coords = settings, settings.plan.mesh.coords(self.rank)
        self.close_peer_memories()
        self.groups.clear()
        self.peer_memories.clear()

    def rebuild(self, further: Iterable[dist.ProcessGroup]) -> None:
        """Leave all process groups, and the `further` groups that other objects made, and take this rank's part of
        models under the present plan."""
        leave_groups([*self._process_groups(), *further])
        self._joined.clear()
        self._further.clear()
        self.shard, self.stage = self._join_divided()

    def close_peer_memories(self) -> None:
        """Give the memory of all peer_memories back; the peer_memories can be used again."""
        for memory in self.peer_memories.values():
            memory.close()

    def heads(self, model: WanModel) -> int:
        """Heads of this rank's part of a model, over its whole sequence group."""
        return model.config.num_heads // self.shard.size

    def leave_peer_memory(self, degrees: SequenceDegrees) -> None:
        """Do without the peer memory of these degrees until the worker starts anew."""
        left = self.peer_memories.pop(degrees)
        self._joined = {
            key: (group, None if memory is left else memory) for key, (group, memory) in self._joined.items()
        }

    def further_group(self, ranks: int, purpose: str) -> dist.ProcessGroup:
        """A process group, for one purpose alone, of this rank and the others of the `ranks` ranks that share a
        sequence.

        An exchange through the group waits for no exchange of another purpose. `ranks` is 2 at least. The group is made
        at its first use under a plan. A collective call of all ranks.
        """
        members = self.plan.sequence_groups(ranks)
        key = (purpose, *members)
        if key not in self._further:
            self._further[key] = own_process_group(members, self.rank)
        group = self._further[key]
        assert group is not None, "a sequence that one rank has alone"
        return group

    def over_sequence(self, group: SequenceGroup) -> OverSequence | None:
        """Computes sums and maxima over the ranks of a group; None where the group has one rank."""
        joined = self.xfuser_groups.get(group.degrees) or group
        return over_sequence(joined.ulysses, joined.ring) if group.degrees.ranks > 1 else None

    def _join_divided(self) -> tuple[TensorShard, Stage]:
        """This rank's part of the matrices and of the blocks, with the process groups that belong to them."""
        plan = self.plan
        groups = plan.mesh.groups("tensor")
        tensor_group = own_process_group(groups, self.rank)
        overlapped = own_process_group(groups, self.rank) if self.settings.overlap else None
        pipelines = plan.mesh.groups("stage")
        ranks = next(ranks for ranks in pipelines if self.rank in ranks)
        return (
            TensorShard(plan.tensor_parallel, self.coords.tensor, tensor_group, overlapped),
            Stage(self.coords.stage, ranks, own_process_group(pipelines, self.rank)),
        )

    def _join_sequence(
        self, degrees: SequenceDegrees, members: Sequence[tuple[int, ...]]
    ) -> tuple[SequenceGroup, PeerMemory | None]:
        """The process groups of `degrees` for these ranks; process groups of earlier plans are kept, and found
        again."""
        key = (degrees, *members)
        if key not in self._joined:
            group, memory = join_group(degrees, self.rank, members), None
            if self.settings.overlap and group.ulysses is not None and degrees.ring == 1:
                memory = open_peer_memory(group.ulysses, self.device)
            self._joined[key] = group, memory
        return self._joined[key]

    def _process_groups(self) -> Iterator[dist.ProcessGroup | None]:
        for group, _ in self._joined.values():
            yield from (group.ulysses, group.ring)
        yield from self._further.values()
        yield from (self.shard.group, self.shard.overlapped, self.stage.group)
