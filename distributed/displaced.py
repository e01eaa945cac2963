"""Displaced patch parallelism for the Wan DiT (DistriFusion, Li et al., CVPR 2024, arXiv 2402.19481).

Each rank computes its own patch of the video. In self-attention its own keys and values are fresh, those of the
other patches are one step old: their exchange starts when a layer has computed them and must be there when the
same layer runs in the next step, so that it hides behind everything in between. Strips along the borders can be
exchanged fresh in every step. Wan has norms over single tokens only, so self-attention is all there is to share.

Synchronous forwards are the exact sequence parallelism of sequence.py, unchanged. The last one before a stale one
sends its keys and values to every rank on the side ("fill").

The buffers and their exchange are `PatchParallelismCommManager` of MIT's distrifuser where that is installed, and
`BufferManager` here, which behaves like it, elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Hashable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..wanvideo.attention import AttentionKernel
from ..wanvideo.model import Grid, SelfAttention, WanModel
from .host_exchange import HostManager, Segment
from .messages import Displaced, Exchange
from .patches import PatchLayout, split_grid, token_pixels
from .plan import ParallelPlan, bounds
from .schedule import STALE
from .sequence import MissingPackage, SequenceGroup

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
MANAGERS = ("auto", "host", "native", "official")
"""Who exchanges: copies through host memory, or gathers with our buffers or distrifuser's."""

INSTALL_LINE = "pip install --no-deps git+https://github.com/mit-han-lab/distrifuser.git"


class Manager(Protocol):
    """Buffers of one shape on every rank, and their exchange while computation goes on.

    Every rank makes the same calls in the same order: `enqueue` in each step, and in the next one either `arrive`
    or `forget` before it.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on this rank's device."""

    def get_buffer_list(self, idx: int) -> list[torch.Tensor]:
        """The tensors of all ranks that have arrived as `idx`, by rank. This rank's own may be missing."""

    def enqueue(self, idx: int, tensor: torch.Tensor) -> None:
        """Start to send this rank's tensor to the others."""

    def arrive(self, idx: int) -> None:
        """Make the device wait for what was enqueued last as `idx`."""

    def forget(self, idx: int) -> None:
        """Do without what was enqueued last as `idx`."""

    def settle(self, everything: bool = False) -> None:
        """End a step. With `everything`, what it enqueued needs no more help of this rank."""

    def clear(self) -> None:
        """Wait for what is on its way, and drop the rest."""


class GatherManager:
    """The exchange by asynchronous gathers, with the buffers of distrifuser's manager or of `BufferManager`.

    Args:
        buffers: their tensors are registered and their buffers created.
    """

    def __init__(self, buffers: BufferManager):
        self.buffers = buffers
        self.get_buffer_list, self.enqueue, self.clear = buffers.get_buffer_list, buffers.enqueue, buffers.clear

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for idx in range(len(self.buffers.handles)) for b in self.get_buffer_list(idx))

    def arrive(self, idx: int) -> None:
        handle, self.buffers.handles[idx] = self.buffers.handles[idx], None
        if handle is not None:
            handle.wait()

    def forget(self, idx: int) -> None:
        self.arrive(idx)  # else it could write over what is enqueued next

    def settle(self, everything: bool = False) -> None:
        """Nothing to do: a gather goes on by itself."""


class BufferManager:
    """Registered tensors of every rank, each gathered from all ranks while computation goes on.

    It has the methods of distrifuser's PatchParallelismCommManager. A rank's tensor lies beside those of the
    others, so that one gather fills the place without another copy.

    Args:
        config: has `device`, `n_device_per_batch` (ranks), `split_idx()` (this rank's place) and `batch_group`, as
            distrifuser's DistriConfig.
    """

    def __init__(self, config: SimpleNamespace):
        self.config = config
        self.handles: list[dist.Work | None] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtype: torch.dtype | None = None
        self._buffers: list[torch.Tensor] = []

    def register_tensor(self, shape: tuple[int, ...], torch_dtype: torch.dtype) -> int:
        """Ask for a buffer; returns its index. All have one dtype."""
        if self._dtype not in (None, torch_dtype):
            raise ValueError(f"Buffers of {self._dtype} and {torch_dtype} cannot be mixed. Use a second manager.")
        self._dtype = torch_dtype
        self._shapes.append(tuple(shape))
        return len(self._shapes) - 1

    def create_buffer(self) -> None:
        """Allocate all that was registered."""
        self._buffers = [
            torch.empty(self.config.n_device_per_batch, math.prod(s), dtype=self._dtype, device=self.config.device)
            for s in self._shapes
        ]
        self.handles = [None] * len(self._shapes)

    def get_buffer_list(self, idx: int) -> list[torch.Tensor]:
        """The tensors of all ranks, by rank, as they lie in the buffer."""
        return list(self._buffers[idx].view(-1, *self._shapes[idx]).unbind())

    def enqueue(self, idx: int, tensor: torch.Tensor) -> None:
        """Start to send this rank's tensor to the others. They have it when `handles[idx]` is waited for."""
        buffer = self._buffers[idx]
        mine = buffer[self.config.split_idx()]
        mine.copy_(tensor.flatten())
        self.handles[idx] = _all_gather(buffer.view(-1), mine, group=self.config.batch_group, async_op=True)

    def clear(self) -> None:
        """Wait for every gather under way."""
        for idx, handle in enumerate(self.handles):
            if handle is not None:
                handle.wait()
                self.handles[idx] = None


def official_version() -> str:
    """The version of distrifuser, or "" where it is not installed."""
    try:
        return importlib.metadata.version("distrifuser")
    except importlib.metadata.PackageNotFoundError:
        return ""


def manager_name(wanted: str) -> str:
    """Who does the exchange, for one of `MANAGERS`; the official one with its version.

    Raises:
        MissingPackage: the official one was asked for and is not installed.
    """
    version = official_version()
    if wanted == "official" and not version:
        raise MissingPackage(
            f"The official DistriFusion package is not installed. Run: {INSTALL_LINE}, or set manager to auto."
        )
    if wanted == "auto":
        return f"distrifuser {version}" if version else "native"
    return f"distrifuser {version}" if wanted == "official" else wanted


def make_buffers(name: str, rank: int, place: int, ranks: int, device: torch.device, group: object) -> BufferManager:
    """Empty buffers: ours, or distrifuser's on a configuration made by hand.

    Its own DistriConfig would start another process group on NCCL and, where one exists, fall back to one rank.
    """
    fields = {
        "rank": rank,
        "device": device,
        "n_device_per_batch": ranks,
        "split_idx": lambda: place,
        "batch_group": group,
        "comm_checkpoint": 1,  # one layer an exchange: those of a video are large
        "verbose": False,
    }
    if name == "native":
        return BufferManager(SimpleNamespace(**fields))
    utils = import_module("distrifuser.utils")
    config = object.__new__(utils.DistriConfig)
    config.__dict__.update(fields)
    return utils.PatchParallelismCommManager(config)


class Codec:
    """How keys and values [2, B, n, heads, d] of a patch lie in a buffer: patches padded to `length` tokens.

    Plain, they keep their dtype. In fp8 (e4m3) they are bytes, with a float32 scale for each head behind them.
    """

    def __init__(self, batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, fp8: bool):
        self.full = (2, batch, length, heads, head_dim)
        self.compute_dtype, self.fp8 = dtype, fp8
        self._elements, self._scales = math.prod(self.full), (2, batch, 1, heads, 1)
        self.dtype = torch.uint8 if fp8 else dtype
        self.shape = (self._elements + 4 * math.prod(self._scales),) if fp8 else self.full

    def encode(self, kv: torch.Tensor) -> torch.Tensor:
        """kv [2, B, n, heads, d] as a buffer of `shape` and `dtype`."""
        missing = self.full[2] - kv.shape[2]
        if not self.fp8:
            return F.pad(kv, (0, 0, 0, 0, 0, missing)) if missing else kv
        scale = kv.abs().amax((2, 4), keepdim=True).float().clamp_min(1e-12) / _FP8_MAX
        small = (kv / scale).clamp(-_FP8_MAX, _FP8_MAX).to(FP8).view(torch.uint8)
        packed = F.pad(small, (0, 0, 0, 0, 0, missing)) if missing else small
        return torch.cat([packed.flatten(), scale.flatten().view(torch.uint8)])

    def decode(self, buffer: torch.Tensor, out: torch.Tensor) -> None:
        """Write the first n tokens of a buffer into out [2, B, n, heads, d]."""
        n = out.shape[2]
        if not self.fp8:
            out.copy_(buffer[:, :, :n])
            return
        small = buffer[: self._elements].view(FP8).view(self.full)[:, :, :n]
        scale = buffer[self._elements :].view(torch.float32).view(self._scales)
        torch.mul(small.to(out.dtype), scale.to(out.dtype), out=out)


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


@dataclass(frozen=True)
class Routes:
    """Which of its tokens this rank sends to each other rank, and how many it gets from each.

    Args:
        sent: places in what this rank has, reader by reader.
        received_places: where what arrives belongs, owner by owner; None where that is the order it comes in.
    """

    sent: torch.Tensor
    sent_counts: list[int]
    received_counts: list[int]
    received_places: torch.Tensor | None = None

    def exchange(self, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Send tokens of own [2, B, n, heads, d]; returns those that arrived, in the same form."""
        token = own.numel() // max(1, own.shape[2])
        outgoing = own.index_select(2, self.sent).movedim(2, 0).contiguous()
        arrived = outgoing.new_empty(sum(self.received_counts), *outgoing.shape[1:])
        dist.all_to_all_single(
            arrived.view(-1),
            outgoing.view(-1),
            [count * token for count in self.received_counts],
            [count * token for count in self.sent_counts],
            group=group,
        )
        return arrived.movedim(0, 2)


def strip_routes(layout: PatchLayout, place: int, device: torch.device) -> Routes:
    """The border strips that the patch at `place` sends and receives fresh."""
    ranks = range(len(layout.patches))
    sent = [layout.strip(place, reader) for reader in ranks]
    offsets = [sum(layout.counts[:owner]) for owner in ranks]
    received = [layout.strip(owner, place) + offsets[owner] for owner in ranks]
    return Routes(
        torch.cat(sent).to(device), [len(s) for s in sent], [len(r) for r in received], torch.cat(received).to(device)
    )


def shard_routes(layout: PatchLayout, place: int, device: torch.device) -> Routes:
    """From the shards of the sequence, as the exact path has them, to the patches."""
    ranks = range(len(layout.patches))
    shards = [bounds(layout.grid.tokens, len(ranks), rank) for rank in ranks]

    def held(shard: tuple[int, int], patch: int) -> torch.Tensor:
        index = layout.index(patch)
        return index[(index >= shard[0]) & (index < shard[1])] - shard[0]

    sent = [held(shards[place], patch) for patch in ranks]
    return Routes(torch.cat(sent).to(device), [len(s) for s in sent], [len(held(s, place)) for s in shards])


class StaleAttention:
    """Self-attention of a patch to its own fresh and the other patches' last keys and values; call layer by layer."""

    def __init__(self, branch: Branch, place: int, kernel: AttentionKernel, groups: Groups, device: torch.device):
        self.branch, self.place, self.kernel, self.groups = branch, place, kernel, groups
        self.part = branch.layout.index(place).to(device)
        self.received = 0
        self._strips = strip_routes(branch.layout, place, device) if any(branch.layout.border) else None
        self._layer = 0
        self._stops = Stopwatch(device)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layer, self._layer = self._layer, self._layer + 1
        own = torch.stack((k, v))
        keys, values = self._assemble(layer, own)
        self.branch.manager.enqueue(layer, self.branch.codec.encode(own))
        return self.kernel(q, keys, values)

    def finish(self) -> None:
        """Leave the step, after the last layer or in the middle. What was sent has until the next step."""
        self.branch.manager.settle()

    @property
    def waited(self) -> float:
        """Seconds for which the device stood still for an exchange. Waits for the device."""
        return self._stops.seconds()

    def _assemble(self, layer: int, own: torch.Tensor) -> torch.Tensor:
        """Keys and values of all patches, patch by patch: [2, B, tokens, heads, d]."""
        manager, counts = self.branch.manager, self.branch.layout.counts
        self._stops.start()
        manager.arrive(layer)
        fresh = self._strips.exchange(own, self.groups.fresh) if self._strips else None
        self._stops.stop()
        full = own.new_empty(*own.shape[:2], sum(counts), *own.shape[3:])
        parts = full.split(counts, dim=2)
        for rank, (buffer, part) in enumerate(zip(manager.get_buffer_list(layer), parts, strict=True)):
            if rank == self.place:
                part.copy_(own)
            else:
                self.branch.codec.decode(buffer, part)
                self.received += buffer.nbytes
        if fresh is not None:
            full.index_copy_(2, self._strips.received_places, fresh)
            self.received += fresh.nbytes
        return full


class FillAttention:
    """The exact self-attention of a sequence shard, which also sends every patch's keys and values on their way."""

    def __init__(
        self, branch: Branch, exact: SelfAttention, group: SequenceGroup, groups: Groups, device: torch.device
    ):
        self.branch, self.exact, self.groups = branch, exact, groups
        self.part = slice(*group.shard(branch.layout.grid.tokens))
        self._routes = shard_routes(branch.layout, group.index, device)
        self._layer = 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layer, self._layer = self._layer, self._layer + 1
        patch = self._routes.exchange(torch.stack((k, v)), self.groups.fresh)
        self.branch.manager.forget(layer)  # of a stale step before
        self.branch.manager.enqueue(layer, self.branch.codec.encode(patch))
        return self.exact(q, k, v)

    def finish(self) -> None:
        """Leave the step, after the last layer or in the middle."""
        self.branch.manager.settle()


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
        if step.kind == STALE:
            if branch is None:
                raise StaleError("The workers have no keys and values of the step before. Queue the prompt again.")
            return StaleAttention(branch, group.index, model.kernel, self._groups[group.degrees.ranks], self.device)
        groups = self._join(group.degrees.ranks)
        if branch is None:
            branch = self._branches[lanes] = self._new_branch(step, len(lanes), model, grid, group, groups)
        return FillAttention(branch, exact, group, groups, self.device)

    def _new_branch(
        self, step: Displaced, batch: int, model: WanModel, grid: Grid, group: SequenceGroup, groups: Groups
    ) -> Branch:
        """Allocate the buffers of some batch items, and time their exchange."""
        config, ranks = model.config, group.degrees.ranks
        layout = split_grid(grid, step.split, ranks, token_pixels(config))
        heads = config.num_heads // self.plan.tensor_parallel
        codec = Codec(batch, max(layout.counts), heads, config.head_dim, model.compute_dtype, step.fp8_buffers)
        name = manager_name(step.manager)
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
            segment = Segment(manager.registered_bytes, place, ranks, self.device, groups.gather)
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
            buffers=sum(branch.manager.nbytes for branch in self._branches.values()),
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


class StaleError(RuntimeError):
    """A stale step was asked for where there is nothing stale."""


class Stopwatch:
    """Adds up the time between `start` and `stop` on the device, without making the host wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = self._begin = 0.0

    def start(self) -> None:
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._begin = time.perf_counter()

    def stop(self) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._begin

    def seconds(self) -> float:
        """The sum. Waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
