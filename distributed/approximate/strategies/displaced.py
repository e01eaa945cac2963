"""Displaced patch parallelism for the Wan DiT (DistriFusion, Li et al., CVPR 2024, arXiv 2402.19481).

Each rank computes its own patch of the video. In self-attention the keys and values of its own patch are fresh, and
the keys and values of the other patches are one step old. Their exchange starts when a layer has computed them, and has
until the same layer runs in the next step, so that it hides behind all computation in between. Strips along the
borders can be exchanged fresh in every step. Wan's norms go over single tokens, so only self-attention needs other
patches.

Synchronous forwards are the exact sequence parallelism of sequence_attention.py, unchanged. The last synchronous
forward before a stale one also sends its keys and values to every rank ("fill").
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ....wanvideo.attention.kernels import AttentionKernel
from ....wanvideo.model.layers import SelfAttention
from ...comm import timing
from ...comm.host_kv import HostManager
from ...parallel.exact import exact_attention
from ...parallel.groups import ParallelGroups
from ...parallel.sequence_group import SequenceGroup
from ...parallel.strategy import Step, StepInputs, WorkItem
from ...protocol.reports import Exchange
from ...protocol.requests import Displaced
from ...shm import signs
from ...shm.pinned import PinnedSharedMemory
from ...shm.signs import Mark
from ..kv_buffers import Codec, GatherManager, Manager, make_buffers, manager_name
from ..patch_exchange import PatchesOfShards, Strips
from ..patch_layout import PatchLayout, split_grid, token_pixels
from ..schedule import STALE
from ..stale import StaleError, StaleStrategy

_PURPOSE, _REMEDY = "the patches' keys and values", "Use fewer frames, kv_buffers fp8, or another manager."


@dataclass(frozen=True)
class Groups:
    """Process groups of the ranks that share a video, beside the groups of the exact path.

    Each group has a communicator of its own, so that strips, which are exchanged fresh, do not queue behind gathers,
    which have a whole step's time.
    """

    gather: dist.ProcessGroup
    fresh: dist.ProcessGroup


@dataclass
class Branch:
    """The buffers that this rank keeps between the steps of a run for one branch."""

    layout: PatchLayout
    codec: Codec
    manager: Manager
    manager_name: str
    layers: int
    layer_seconds: float  # of one layer's exchange with nothing else running
    complete: bool = False  # all layers' buffers are of one forward, which was not given up

    def finish(self, layers: int) -> None:
        """Leave a forward after `layers` layers: all layers, or fewer where the forward was given up."""
        self.manager.settle()
        self.complete = layers == self.layers


class StaleAttention:
    """Self-attention of a patch to its own fresh and the other patches' last keys and values; call layer by layer."""

    def __init__(self, branch: Branch, group_rank: int, kernel: AttentionKernel, groups: Groups, device: torch.device):
        self.branch, self.group_rank, self.kernel, self.groups = branch, group_rank, kernel, groups
        self.part = branch.layout.index(group_rank).to(device)
        self.received = 0
        self._strips = Strips(branch.layout, group_rank) if any(branch.layout.border) else None
        self._layer = 0
        self._stops = timing.count_wait(timing.PATCHES, groups.fresh, timing.Spans(device))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own = torch.stack((k, v))
        keys, values = self._assemble(self._layer, own)
        self.branch.manager.enqueue(self._layer, self.branch.codec.encode(own))
        self._layer += 1
        return self.kernel(q, keys, values)

    def finish(self) -> None:
        """Leave the step, after the last layer or in the middle. Tensors that were sent have until the next step to
        arrive."""
        with timing.measure_wait(timing.PATCHES, self.groups.fresh):
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
            if rank == self.group_rank:
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
        with timing.measure_wait(timing.PATCHES, self.groups.fresh):
            patch = self._patches.exchange(torch.stack((k, v)), self.groups.fresh)
            self.branch.manager.forget(self._layer)  # of a stale step before
        self.branch.manager.enqueue(self._layer, self.branch.codec.encode(patch))
        self._layer += 1
        return self.exact(q, k, v)

    def finish(self) -> None:
        """Leave the step, after the last layer or in the middle."""
        with timing.measure_wait(timing.PATCHES, self.groups.fresh):
            self.branch.finish(self._layer)


class DisplacedStep(Step):
    """A forward that keeps its keys and values for the next forward, or that uses those of the forward before."""

    def __init__(self, patches: DisplacedPatches, inputs: StepInputs, step: Displaced):
        self.patches, self.inputs, self.step = patches, inputs, step
        self._stale: list[StaleAttention] = []

    def work(self, items: slice) -> list[WorkItem]:
        """This rank's patch of the video if the step is stale, else its shard of the sequence; in one pass.

        Raises:
            StaleError: no keys and values of the step before are kept.
            MissingPackage: distrifuser's manager was asked for, and distrifuser is not installed.
        """
        if self.step.kind == STALE:
            stale = self.patches.stale(self.step, items, self.inputs)
            self._stale.append(stale)
            return [WorkItem(items, stale.part, len(stale.part), stale, stale.finish)]
        fill = self.patches.fill(self.step, items, self.inputs)
        return [WorkItem(items, fill.part, fill.part.stop - fill.part.start, fill, fill.finish)]

    def report(self) -> Exchange | None:
        """What the stale forwards of this request exchanged. Waits for the device."""
        if not self._stale:
            return None
        branches = [attention.branch for attention in self._stale]
        return Exchange(
            manager=branches[0].manager_name,
            received=sum(attention.received for attention in self._stale),
            seconds=sum(branch.layer_seconds * branch.layers for branch in branches),
            waited=sum(attention.waited for attention in self._stale),
            buffers=self.patches.nbytes,
        )


class DisplacedPatches(StaleStrategy, name="displaced"):
    """The displaced patches of one worker, over the models, runs and branches that it is asked for.

    Nothing else may take the device memory that is free beside a forward: the client has counted on it for the buffers
    (displaced_memory_estimate.py).
    """

    keeps_texts = False

    def __init__(self, parallel: ParallelGroups):
        super().__init__(parallel)
        self.device = parallel.device
        self._branches: dict[Hashable, Branch] = {}
        self._segments: list[PinnedSharedMemory] = []

    def suits(self, inputs: StepInputs) -> bool:
        """Whether several ranks share the video, and all tokens are the video's: the tokens of VACE's streams, and
        tokens behind the video, are in no patch."""
        layers = range(inputs.model.config.num_layers)
        alone = inputs.model.self_attentions(inputs.conditioning, layers) <= len(layers)
        return inputs.group.degrees.ranks > 1 and not inputs.grid.context_tokens and alone

    def approximate(self, inputs: StepInputs, step: Displaced) -> Step:
        """A forward that fills the buffers, or a forward that uses them."""
        return DisplacedStep(self, inputs, step)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all branches on this rank's device."""
        return sum(branch.manager.nbytes for branch in self._branches.values())

    def trim(self) -> None:
        """Drop all buffers, once nothing is being written into them."""
        for branch in self._branches.values():
            branch.manager.clear()
        self._branches.clear()

    def close(self) -> None:
        """Give host memory back too."""
        self.trim()
        while self._segments:
            self._segments.pop().close()

    def stale(self, step: Displaced, items: slice, inputs: StepInputs) -> StaleAttention:
        """Self-attention of this rank's patch of some batch items, with the keys and values of the step before."""
        branch, group = self._begun(step.branch_ids[items]), inputs.group
        if branch is None:
            raise StaleError.nothing_kept()
        groups = self._groups(group)
        return StaleAttention(branch, group.index, inputs.self_kernel, groups, self.device)

    def fill(self, step: Displaced, items: slice, inputs: StepInputs) -> FillAttention:
        """Exact self-attention of this rank's shard of some batch items, which keeps keys and values for the next
        step."""
        branch_ids, group = step.branch_ids[items], inputs.group
        exact = exact_attention(self.parallel, group, inputs.model, inputs.grid, len(branch_ids), inputs.self_kernel)
        branch = self._begun(branch_ids)
        groups = self._groups(group)
        if branch is None:
            branch = self._branches[branch_ids] = self._new_branch(step, len(branch_ids), inputs, groups)
        return FillAttention(branch, exact, group, groups, self.device)

    def _begun(self, branch_ids: Hashable) -> Branch | None:
        """The buffers of some batch items, if the last forward filled all of them, else None.

        The buffers count as incomplete until the forward that begins now has finished.
        """
        branch = self._branches.get(branch_ids)
        if branch is not None and not branch.complete:
            self._branches.pop(branch_ids).manager.clear()
            return None
        if branch is not None:
            branch.complete = False  # until it has been finished: the forward may end before it gets here
        return branch

    def _new_branch(self, step: Displaced, batch: int, inputs: StepInputs, groups: Groups) -> Branch:
        """Allocate the buffers of some batch items, and time their exchange."""
        model, group = inputs.model, inputs.group
        config, ranks, layers = model.config, group.degrees.ranks, len(model.span)
        layout = split_grid(inputs.grid, step.split, ranks, token_pixels(config))
        heads = self.parallel.heads(model)
        codec = Codec(batch, max(layout.counts), heads, config.head_dim, model.compute_dtype, step.fp8_buffers)
        name = manager_name(step.manager, self.device)
        manager: Manager
        if name == "host":
            manager = self._host_manager(codec, layers, group.index, groups)
        else:
            buffers = make_buffers(name, self.parallel.rank, group.index, ranks, self.device, groups.gather)
            for _ in range(layers):
                buffers.register_tensor(codec.shape, codec.dtype)
            buffers.create_buffer()
            manager = GatherManager(buffers)
        return Branch(layout, codec, manager, name, layers, self._time_exchange(manager, codec))

    def _host_manager(self, codec: Codec, layers: int, group_rank: int, groups: Groups) -> HostManager:
        """A manager that exchanges through host memory.

        Its segment is kept for later runs, as pinning takes a second for each GiB.
        """
        ranks = groups.gather.size()
        manager = HostManager(group_rank, ranks, self.device)
        for _ in range(layers):
            manager.register_tensor(codec.shape, codec.dtype)
        managers = [branch.manager for branch in self._branches.values()]
        used = [other.segment for other in managers if isinstance(other, HostManager)]
        free = [s for s in self._segments if s not in used and s.ranks == ranks]
        segment = next((s for s in free if s.nbytes >= manager.registered_bytes), None)
        if segment is None:
            for small in free:
                small.close()
                self._segments.remove(small)
            nbytes = manager.registered_bytes
            segment = PinnedSharedMemory(nbytes, group_rank, ranks, self.device, groups.gather, _PURPOSE, _REMEDY)
            self._segments.append(segment)
        manager.create_buffer(segment)
        with signs.marked(Mark.WAITING):
            dist.barrier(groups.gather)  # see create_buffer
        return manager

    def _groups(self, group: SequenceGroup) -> Groups:
        """The process groups of the ranks that share a video; made at first use, by all ranks."""
        ranks = group.degrees.ranks
        return Groups(self.parallel.further_group(ranks, "gather"), self.parallel.further_group(ranks, "fresh"))

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
