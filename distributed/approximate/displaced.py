"""Displaced patch parallelism for the Wan DiT (DistriFusion, Li et al., CVPR 2024, arXiv 2402.19481).

Each rank computes its own patch of the video. In self-attention its own keys and values are fresh, those of the
other patches are one step old: their exchange starts when a layer has computed them and must be there when the
same layer runs in the next step, so that it hides behind everything in between. Strips along the borders can be
exchanged fresh in every step. Wan has norms over single tokens only, so self-attention is all there is to share.

Synchronous forwards are the exact sequence parallelism of sequence.py, unchanged. The last one before a stale one
sends its keys and values to every rank on the side ("fill").
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...wanvideo.attention.kernels import AttentionKernel
from ...wanvideo.base.errors import UserError
from ...wanvideo.base.grid import Grid
from ...wanvideo.model.layers import SelfAttention
from ...wanvideo.model.model import WanModel
from ..comm import timing
from ..comm.host_kv import HostManager
from ..parallel.sequence import SequenceGroup
from ..plan.degrees import ParallelPlan
from ..protocol.reports import Exchange
from ..protocol.requests import Displaced
from ..shm.pinned import Segment
from .kv_buffers import Codec, GatherManager, Manager, make_buffers, manager_name
from .patch_exchange import PatchesOfShards, Strips
from .patch_layout import PatchLayout, split_grid, token_pixels
from .schedule import STALE

_PURPOSE, _REMEDY = "the patches' keys and values", "Use fewer frames, kv_buffers fp8, or another manager."


@dataclass(frozen=True)
class Groups:
    """Process groups of the ranks that share a video, beside those of the exact path: each has a communicator of
    its own, so that what is exchanged fresh does not queue behind what has a whole step's time."""

    gather: dist.ProcessGroup
    fresh: dist.ProcessGroup


@dataclass
class Branch:
    """What one branch of a run keeps between its steps on this rank."""

    layout: PatchLayout
    codec: Codec
    manager: Manager
    manager_name: str
    layers: int
    layer_seconds: float  # that one layer's exchange takes, nothing else running
    complete: bool = False  # every layer's buffers are of one forward: none was given up in between

    def finish(self, layers: int) -> None:
        """Leave a forward after so many layers: all of them, or fewer where it was given up."""
        self.manager.settle()
        self.complete = layers == self.layers


class StaleAttention:
    """Self-attention of a patch to its own fresh and the other patches' last keys and values; call layer by layer."""

    def __init__(self, branch: Branch, place: int, kernel: AttentionKernel, groups: Groups, device: torch.device):
        self.branch, self.place, self.kernel, self.groups = branch, place, kernel, groups
        self.part = branch.layout.index(place).to(device)
        self.received = 0
        self._strips = Strips(branch.layout, place) if any(branch.layout.border) else None
        self._layer = 0
        self._stops = timing.counted(timing.PATCHES, groups.fresh, timing.Spans(device))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own = torch.stack((k, v))
        keys, values = self._assemble(self._layer, own)
        self.branch.manager.enqueue(self._layer, self.branch.codec.encode(own))
        self._layer += 1
        return self.kernel(q, keys, values)

    def finish(self) -> None:
        """Leave the step, after the last layer or in the middle. What was sent has until the next step."""
        with timing.standing(timing.PATCHES, self.groups.fresh):
            self.branch.finish(self._layer)

    @property
    def waited(self) -> float:
        """Seconds for which the device stood still for an exchange. Waits for the device."""
        return sum(self._stops.each())

    def _assemble(self, layer: int, own: torch.Tensor) -> torch.Tensor:
        """Keys and values of all patches, patch by patch: [2, B, tokens, heads, d]."""
        manager, counts = self.branch.manager, self.branch.layout.counts
        self._stops.start()
        manager.arrive(layer)
        fresh = self._strips.exchange(own, self.groups.fresh) if self._strips else []
        self._stops.stop()
        full = own.new_empty(*own.shape[:2], sum(counts), *own.shape[3:])
        parts = list(full.split(counts, dim=2))
        for rank, (buffer, part) in enumerate(zip(manager.get_buffer_list(layer), parts, strict=True)):
            if rank == self.place:
                part.copy_(own)
            else:
                self.branch.codec.decode(buffer, part)
                self.received += buffer.nbytes
        if self._strips:
            self._strips.insert(parts, fresh)
            self.received += sum(strip.nbytes for strip in fresh)
        return full


class FillAttention:
    """The exact self-attention of a sequence shard, which also sends every patch's keys and values on their way."""

    def __init__(
        self, branch: Branch, exact: SelfAttention, group: SequenceGroup, groups: Groups, device: torch.device
    ):
        self.branch, self.exact, self.groups = branch, exact, groups
        self.part = slice(*group.shard(branch.layout.grid.tokens))
        self._patches = PatchesOfShards(branch.layout, group, device)
        self._layer = 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with timing.standing(timing.PATCHES, self.groups.fresh):
            patch = self._patches.exchange(torch.stack((k, v)), self.groups.fresh)
            self.branch.manager.forget(self._layer)  # of a stale step before
        self.branch.manager.enqueue(self._layer, self.branch.codec.encode(patch))
        self._layer += 1
        return self.exact(q, k, v)

    def finish(self) -> None:
        """Leave the step, after the last layer or in the middle."""
        with timing.standing(timing.PATCHES, self.groups.fresh):
            self.branch.finish(self._layer)


class PatchParallel:
    """The displaced patches of one worker, over the models, runs and branches that it is asked for.

    Every method is called on all ranks with the same request.
    """

    def __init__(self, rank: int, plan: ParallelPlan, device: torch.device):
        self.rank, self.plan, self.device = rank, plan, device
        self._groups: dict[int, Groups] = {}
        self._branches: dict[Hashable, Branch] = {}
        self._segments: list[Segment] = []
        self._run = ""

    def begin(self, step: Displaced) -> None:
        """Drop the buffers of an earlier run."""
        if step.run != self._run:
            self.clear()
            self._run = step.run

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all branches on this rank's device."""
        return sum(branch.manager.nbytes for branch in self._branches.values())

    def clear(self) -> None:
        """Drop all buffers, once nothing is being written into them."""
        for branch in self._branches.values():
            branch.manager.clear()
        self._branches.clear()

    def close(self) -> None:
        """Give host memory back too."""
        self.clear()
        while self._segments:
            self._segments.pop().close()

    def attention(
        self,
        step: Displaced,
        lanes: tuple[str, ...],
        model: WanModel,
        grid: Grid,
        group: SequenceGroup,
        exact: SelfAttention,
    ) -> FillAttention | StaleAttention:
        """Self-attention of one forward of some batch items, which is no exact one.

        Raises:
            StaleError: there is nothing from the step before.
            MissingPackage: the official manager was asked for and is not installed.
        """
        branch = self._branches.get(lanes)
        if branch is not None and not branch.complete:
            self._branches.pop(lanes).manager.clear()
            branch = None
        if step.kind == STALE:
            if branch is None:
                raise StaleError("The workers have no keys and values of the step before. Queue the prompt again.")
            branch.complete = False  # until it has been finished: the forward may end before it gets here
            groups = self._groups[group.degrees.ranks]
            return StaleAttention(branch, group.index, model.self_kernel, groups, self.device)
        groups = self._join(group.degrees.ranks)
        if branch is None:
            branch = self._branches[lanes] = self._new_branch(step, len(lanes), model, grid, group, groups)
        branch.complete = False
        return FillAttention(branch, exact, group, groups, self.device)

    def _new_branch(
        self, step: Displaced, batch: int, model: WanModel, grid: Grid, group: SequenceGroup, groups: Groups
    ) -> Branch:
        """Allocate the buffers of some batch items, and time their exchange."""
        config, ranks = model.config, group.degrees.ranks
        layout = split_grid(grid, step.split, ranks, token_pixels(config))
        heads = config.num_heads // self.plan.tensor_parallel
        codec = Codec(batch, max(layout.counts), heads, config.head_dim, model.compute_dtype, step.fp8_buffers)
        name = manager_name(step.manager, self.device)
        if name == "host":
            manager = self._host_manager(codec, len(model.span), group.index, groups)
        else:
            buffers = make_buffers(name, self.rank, group.index, ranks, self.device, groups.gather)
            for _ in model.span:
                buffers.register_tensor(codec.shape, codec.dtype)
            buffers.create_buffer()
            manager = GatherManager(buffers)
        return Branch(layout, codec, manager, name, len(model.span), self._time_exchange(manager, codec))

    def _host_manager(self, codec: Codec, layers: int, place: int, groups: Groups) -> HostManager:
        """Pinning takes a second for each GiB, so a segment is kept for later runs."""
        ranks = groups.gather.size()
        manager = HostManager(place, ranks, self.device)
        for _ in range(layers):
            manager.register_tensor(codec.shape, codec.dtype)
        used = [branch.manager.segment for branch in self._branches.values()]
        free = [s for s in self._segments if s not in used and s.ranks == ranks]
        segment = next((s for s in free if s.nbytes >= manager.registered_bytes), None)
        if segment is None:
            for small in free:
                small.close()
                self._segments.remove(small)
            nbytes = manager.registered_bytes
            segment = Segment(nbytes, place, ranks, self.device, groups.gather, _PURPOSE, _REMEDY)
            self._segments.append(segment)
        manager.create_buffer(segment)
        dist.barrier(groups.gather)  # see create_buffer
        return manager

    def _join(self, ranks: int) -> Groups:
        """The process groups of this rank for videos shared by `ranks`; made at first use, by all ranks."""
        if ranks not in self._groups:
            for members in self.plan.sequence_groups(ranks):
                made = Groups(dist.new_group(list(members)), dist.new_group(list(members)))
                if self.rank in members:
                    self._groups[ranks] = made
        return self._groups[ranks]

    def report(self, attentions: list[StaleAttention]) -> Exchange:
        """What the stale forwards of one request exchanged. Waits for the device."""
        branches = [attention.branch for attention in attentions]
        return Exchange(
            manager=branches[0].manager_name,
            received=sum(attention.received for attention in attentions),
            seconds=sum(branch.layer_seconds * branch.layers for branch in branches),
            waited=sum(attention.waited for attention in attentions),
            buffers=self.nbytes,
        )

    def _time_exchange(self, manager: Manager, codec: Codec) -> float:
        """Seconds that the exchange of one layer takes alone: the second of two, as the first one connects."""
        nothing = torch.zeros(codec.shape, dtype=codec.dtype, device=self.device)
        for _ in range(2):
            self._synchronize()
            start = time.perf_counter()
            manager.enqueue(0, nothing)
            manager.arrive(0)
            manager.settle(everything=True)
            self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class StaleError(UserError, RuntimeError):
    """A stale step was asked for where there is nothing stale."""
