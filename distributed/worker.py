"""One process per GPU: joins the group, holds its copy of the weights, answers requests one after the other."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from ..wanvideo import pointwise
from ..wanvideo.attention import AttentionError, get_kernel
from ..wanvideo.checkpoint import (
    DTYPES,
    WEIGHT_DTYPES,
    WeightSource,
    change,
    held_as,
    held_dtype,
    held_sizes,
    is_quantized_at_load,
    open_weights,
    place,
)
from ..wanvideo.conditioning import NOTHING, Conditioning
from ..wanvideo.config import CheckpointError, WanConfig
from ..wanvideo.lora import Difference, LowRank, PatchError, Replacement, WeightPatch
from ..wanvideo.model import Grid, Part, SelfAttention, WanModel, grid_of, pad_to_patch, patchify
from ..wanvideo.quantized import Weight
from ..wanvideo.variants import VariantModel
from . import xfuser_backend
from .arena import ArenaReader
from .displaced import PatchParallel, StaleAttention, StaleError
from .gate import Cancelled, Gate
from .host_exchange import HostMemoryError
from .links import link_kind
from .memory import (
    REFERENCE_TOKENS,
    Demand,
    Placement,
    PlacementError,
    activation_bytes,
    demand_of,
    fitting_blocks,
    needed_bytes,
    place_weights,
)
from .messages import (
    ArenaRef,
    ConditioningRef,
    Exchange,
    Forward,
    HeldWeights,
    Load,
    ModelSpec,
    ModelStatus,
    Patch,
    PatchRef,
    PoolSettings,
    Ready,
    Reply,
    Report,
    Request,
    Start,
    StepOut,
    TensorRef,
    Trim,
    Unload,
    WorkerStatus,
    decode,
    encode,
)
from .plan import PlanError, SequenceDegrees, bounds
from .residence import Residence, ShareGroup, Slots, gather_rows, join_share_group
from .schedule import EXACT
from .sequence import MissingPackage, NativeAttention, SequenceGroup, join_group, place_in

log = logging.getLogger(__name__)
_BLOCKS_AHEAD = 2
"""How far the host may run ahead of its GPU: else it had passed every cancel check before the first block ran."""
_MARGIN = 2**26
"""Bytes of a GPU that placements leave alone, for what is not torch's: NCCL's buffers and fragments."""

_FOR_THE_USER = (
    AttentionError,
    CheckpointError,
    HostMemoryError,
    MissingPackage,
    PatchError,
    PlacementError,
    PlanError,
    StaleError,
    xfuser_backend.BackendError,
)
"""Errors whose text says what is wrong and what to do; others are told with their traceback in the console."""


@dataclass
class LoadedModel:
    """A model in this worker's memory."""

    source: WeightSource
    model: WanModel
    residence: Residence
    placement: Placement
    demand: Demand
    resident: int  # blocks that belong on the device, as they fitted last
    reserve: int = 0  # bytes that activations took beyond their estimate, learned by running out of memory
    patched: set[str] = field(default_factory=set)
    uuid: str = ""

    @property
    def fixed(self) -> int:
        """Bytes of embeddings and head."""
        return self.demand.fixed

    @property
    def device_bytes(self) -> int:
        return self.fixed + self.residence.device_bytes


class Worker:
    """Executes requests; every method that the ranks run together makes the same collective calls on all."""

    def __init__(self, rank: int, settings: PoolSettings, gate: Gate):
        self.rank, self.settings, self.gate = rank, settings, gate
        self.device = torch.device("cuda", rank) if settings.device == "cuda" else torch.device("cpu")
        self.models: dict[ModelSpec, LoadedModel] = {}
        self.groups: dict[SequenceDegrees, SequenceGroup] = {}
        self.xfuser_groups: dict[SequenceDegrees, xfuser_backend.XfuserGroup] = {}
        self.slots = Slots(self.device)
        self.share_groups: dict[int, ShareGroup] = {1: ShareGroup()}
        self.patches = PatchParallel(rank, settings.plan.num_gpus, self.device)
        self.arena = ArenaReader()
        self.conditioning = ArenaReader()
        self.peak_private = 0
        self.fused = pointwise.use_triton(self.device)

    def handle(self, request: Request) -> Reply:
        """Answer one request; errors of the request become part of the reply."""
        started = time.perf_counter()
        reply = Reply(request.id, self.rank)
        try:
            with torch.inference_mode():
                match request:
                    case Load():
                        self.load(request.spec, request.tokens)
                        reply = replace(reply, patches=self.models[request.spec].uuid)
                    case Patch():
                        self.patch(request)
                    case Forward():
                        reply = replace(reply, exchange=self.forward(request))
                    case Trim():
                        self.trim()
                    case Unload():
                        self.unload(request.specs)
                    case StepOut():
                        self.step_out(request)
                    case Report():
                        reply = replace(reply, status=self.status())
        except Cancelled:
            self.trim()  # the client will not wait to ask for it
            reply = replace(reply, cancelled=True)
        except torch.OutOfMemoryError as error:
            self._learn(request)
            reply = replace(reply, kind="OutOfMemory", error=_out_of_memory(self.device, error))
        except _FOR_THE_USER as error:
            reply = replace(reply, kind=type(error).__name__, error=str(error))
        except Exception as error:  # the boundary of the process: whatever it is, the client must hear of it
            log.exception("A request failed.")
            reply = replace(reply, kind=type(error).__name__, error=str(error) or type(error).__name__)
        return replace(reply, seconds=time.perf_counter() - started, weights=self._held_weights())

    def load(self, spec: ModelSpec, tokens: int = 0) -> None:
        """Read the model tensor by tensor to where its weights fit, unless it is there."""
        rooms, host_room = self._agree(spec)
        if not rooms:
            return
        dtype = DTYPES[spec.compute_dtype]
        kernel = get_kernel(spec.attention, self.device, dtype, spec.allow_flash, spec.allow_sdpa)
        source = open_weights(spec.path, self.device)
        self._join_groups(source.config.num_heads)
        with torch.device("meta"):
            model = VariantModel(source.config, kernel, dtype, spec.slice_tokens)
        sizes = held_sizes(source.config, source.header, WEIGHT_DTYPES[spec.weight_dtype])
        demand = demand_of(sizes, self._activations(spec, source.config, tokens))
        ranks = len(self._equals()[0])
        placement = place_weights(demand, rooms, ranks, spec.shard_weights, spec.offload, host_room)
        group = self._share_group(placement.share)
        resident = self._fitting(spec, demand, placement, rooms[self.rank])
        self._make_way(spec, needed_bytes(demand, group.ranks, resident))
        read = functools.partial(self._unplaced, source, spec)
        residence = Residence(source.config.shapes(), read, model.set_weight, self.device, self.slots, group)
        for name in source.config.shapes():
            if not residence.owns(name):
                model.set_weight(name, self._weight(source, spec, name))
        residence.load(resident, self._note_peak)
        self.models[spec] = LoadedModel(source, model.eval(), residence, placement, demand, resident)
        if self.rank == 0:
            log.info("Weights of %s: %s.", Path(spec.path).name, placement.reason)

    def patch(self, request: Patch) -> None:
        """Set the patched weights anew from the file, so that nothing of an earlier patch remains."""
        loaded = self.models[request.spec]
        try:
            weight_of = functools.partial(self._patched, loaded.source, request)
            loaded.residence.update(sorted(loaded.patched | request.weights.keys()), weight_of)
        except BaseException:
            del self.models[request.spec]  # half patched: the next forward reads it again
            raise
        loaded.patched, loaded.uuid = set(request.weights), request.uuid

    def _patched(self, source: WeightSource, request: Patch, name: str) -> Weight:
        patches = [self._weight_patch(request.arena, ref) for ref in request.weights.get(name, ())]
        return self._weight(source, request.spec, name, patches)

    def forward(self, request: Forward) -> Exchange | None:
        """Run this rank's batch items and tokens, and write the result where the client reads it."""
        loaded = self.models[request.spec]
        x, timestep, context = (
            self._input(request.arena, ref) for ref in (request.x, request.timestep, request.context)
        )
        conditioning = self._conditioning(request.conditioning, len(x))
        grid = grid_of(x)
        ranks = self.settings.plan.group_ranks(len(x))
        group = self.groups[self.settings.plan.sequence_degrees(loaded.model.config.num_heads, ranks)]
        tokens = patchify(pad_to_patch(x))
        out = self.arena.view(request.arena, request.out)
        exact, part = self._attention(group, loaded, grid), slice(*group.shard(grid.tokens))
        self._settle(request.spec, loaded, part.stop - part.start)
        # buffers are kept for one self-attention a layer: VACE's blocks and left-out ones are computed exactly
        usual = loaded.model.self_attentions(conditioning) == loaded.model.config.num_layers
        step = request.displaced if ranks > 1 and usual else None
        if step is not None:
            self.patches.begin(step)
        self.gate.begin(request.id)
        residence, groups, most = loaded.residence, self.settings.plan.num_gpus // ranks, request.spec.max_batch
        first, last = bounds(len(x), groups, self.rank // ranks)
        passes = math.ceil(math.ceil(len(x) / groups) / most)
        # ranks that gather weights from each other run the blocks equally often, and leave them together
        together = residence.group.ranks > ranks
        before_block = self._before_block(residence.group.first_rank if together else group.first_rank, residence)
        stale = []
        with residence.passes(passes):
            for start in range(first, last, most):
                items = slice(start, min(start + most, last))
                attend = exact
                if step is not None and step.kind != EXACT:
                    attend = self.patches.attention(step, step.lanes[items], loaded.model, grid, group, exact)
                    part = attend.part
                try:
                    result = loaded.model.transform(
                        tokens[items, part],
                        grid,
                        part,
                        timestep[items],
                        context[items],
                        attend,
                        before_block,
                        conditioning.items(items),
                    )
                finally:
                    if attend is not exact:
                        attend.finish()
                if isinstance(attend, StaleAttention):
                    stale.append(attend)
                _write(out, items, part, result)
            for _ in range(passes - math.ceil((last - first) / most) if together else 0):
                for block in residence.blocks:
                    before_block(block)
        return self.patches.report(stale) if stale else None

    def unload(self, specs: Iterable[ModelSpec]) -> None:
        """Drop the weights of these models and give their memory back to the device."""
        for spec in specs:
            self.models.pop(spec, None)
        if not self.models:
            self.patches.close()
        self._give_back()

    def trim(self) -> None:
        """Give back what only a sampling run needs: displaced patches, the blocks in passing, and torch's cache."""
        self.patches.clear()
        self._give_back()

    def _give_back(self) -> None:
        for loaded in self.models.values():
            loaded.residence.leave_slots()
        self.slots.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def step_out(self, request: StepOut) -> None:
        """Move weights to host memory, where this rank is asked to. Not collective."""
        loaded = self.models.get(request.spec)
        if loaded is None or self.rank not in request.ranks:
            return
        _step_out(loaded.residence, request.nbytes)
        self._give_back()

    def status(self) -> WorkerStatus:
        used, total = _device_memory(self.device)
        return WorkerStatus(
            rank=self.rank,
            pid=os.getpid(),
            device=_device_name(self.device),
            used=used,
            total=total,
            peak_private=self.peak_private,
            fused=self.fused,
            models=tuple(self._model_status(spec, loaded) for spec, loaded in self.models.items()),
            link=link_kind(self.device, self.settings.plan.num_gpus),
            peak_allocated=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
        )

    def _model_status(self, spec: ModelSpec, loaded: LoadedModel) -> ModelStatus:
        degrees = self.settings.plan.sequence_degrees(loaded.model.config.num_heads)
        return ModelStatus(
            name=Path(spec.path).name,
            weight_dtype=held_as(loaded.source.header, spec.weight_dtype),
            compute_dtype=spec.compute_dtype,
            kernel=loaded.model.kernel.name,
            backend="xfuser" if self.settings.usp_backend == "xfuser" else "native",
            ulysses=degrees.ulysses,
            ring=degrees.ring,
            patches=loaded.uuid,
            placement=loaded.placement.reason,
            device_bytes=loaded.device_bytes,
            host_bytes=loaded.residence.host_bytes,
        )

    def _held_weights(self) -> tuple[HeldWeights, ...]:
        held = []
        for spec, loaded in self.models.items():
            share = math.ceil(loaded.demand.block / loaded.placement.share)
            whole = max(loaded.device_bytes, loaded.fixed + loaded.resident * share)
            held.append(HeldWeights(spec, loaded.device_bytes, whole))
        return tuple(held)

    # Where weights live.

    def _agree(self, spec: ModelSpec) -> tuple[list[int], int]:
        """Bytes that each rank's device has for this model, and their host, known to all; none where all have it.

        A rank whose load or patch failed has lost it alone: then all read it again.
        """
        others = sum(m.residence.device_bytes for key, m in self.models.items() if key != spec)
        mine = self.models[spec].device_bytes if spec in self.models else 0
        told = [int(spec in self.models), self._room() + others + mine, _host_room()]
        present, rooms, host_rooms = zip(*gather_rows(told, self.device, self.settings.plan.num_gpus), strict=True)
        if all(present):
            return [], 0
        self.models.pop(spec, None)
        return list(rooms), min(host_rooms)

    def _room(self) -> int:
        """Bytes that this rank's tensors may still take on its device; no limit on a CPU."""
        if self.device.type != "cuda":
            return 2**50
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        cached = torch.cuda.memory_reserved(self.device) - allocated
        return min(int(total * self.settings.memory_fraction) - allocated, free + cached) - _MARGIN + self.slots.nbytes

    def _activations(self, spec: ModelSpec, config: WanConfig, tokens: int) -> int:
        share = math.ceil((tokens or REFERENCE_TOKENS) / self.settings.plan.sequence_ranks)
        return activation_bytes(config, share, spec.max_batch, DTYPES[spec.compute_dtype].itemsize, spec.slice_tokens)

    def _share_group(self, share: int) -> ShareGroup:
        if share not in self.share_groups:
            self.share_groups[share] = join_share_group(self._equals(), self.rank)
        return self.share_groups[share]

    def _equals(self) -> list[Sequence[int]]:
        """Groups of ranks that run with the same weights: one of all."""
        return [range(self.settings.plan.num_gpus)]

    def _fitting(self, spec: ModelSpec, demand: Demand, placement: Placement, room: int) -> int:
        """How many blocks stay on this rank's device, which may have more room than the tightest."""
        if spec.offload == "on" or placement.resident == demand.blocks:
            return placement.resident
        return max(0, fitting_blocks(demand, room, placement.share))

    def _settle(self, spec: ModelSpec, loaded: LoadedModel, tokens: int) -> None:
        """Before a forward of `tokens` tokens on this rank: weights that stepped out come back as far as they fit."""
        if spec.offload == "on":
            return
        residence, share = loaded.residence, loaded.placement.share
        itemsize = DTYPES[spec.compute_dtype].itemsize
        activations = activation_bytes(loaded.model.config, tokens, spec.max_batch, itemsize, spec.slice_tokens)
        demand = replace(loaded.demand, activations=activations + loaded.reserve)
        self._make_way(spec, needed_bytes(demand, share, demand.blocks) - loaded.device_bytes)
        loaded.resident = demand.blocks
        if spec.offload == "auto":
            loaded.resident = max(0, fitting_blocks(demand, self._room() + loaded.device_bytes, share))
        present = residence.on_device
        if len(present) > loaded.resident:
            _step_out(residence, sum(residence.bytes_of(i) for i in present[loaded.resident :]))
        residence.step_in(loaded.resident)

    def _learn(self, request: Request) -> None:
        """After a forward that ran out of memory: the next one leaves more of it to the activations."""
        if isinstance(request, Forward) and request.spec in self.models:
            self.models[request.spec].reserve += max(2**28, self.models[request.spec].demand.activations // 2)

    def _make_way(self, spec: ModelSpec, nbytes: int) -> None:
        """Let other models step out until the device has `nbytes` more room, the one used longest ago first."""
        missing = nbytes - self._room()
        for other, loaded in self.models.items():
            if other != spec and missing > 0 and loaded.residence.device_bytes:
                missing -= _step_out(loaded.residence, missing)
        if spec in self.models:
            self.models[spec] = self.models.pop(spec)  # now the one used last

    def _join_groups(self, num_heads: int) -> None:
        """Make the process groups that a model of `num_heads` heads will use, for each size of group."""
        plan = self.settings.plan
        for ranks in sorted({plan.sequence_ranks, plan.num_gpus}):
            degrees = plan.sequence_degrees(num_heads, ranks)
            if degrees in self.groups:
                continue
            if self.settings.usp_backend == "xfuser" and degrees.ranks > 1:
                self.xfuser_groups[degrees] = xfuser_backend.join_group(degrees, self.device)
                self.groups[degrees] = place_in(degrees, self.rank)
            else:
                self.groups[degrees] = join_group(degrees, self.rank, plan.num_gpus)

    def _attention(self, group: SequenceGroup, loaded: LoadedModel, grid: Grid) -> SelfAttention:
        kernel, heads = loaded.model.kernel, loaded.model.config.num_heads
        if group.degrees.ranks == 1:
            return kernel
        if group.degrees in self.xfuser_groups:
            xfuser_group = self.xfuser_groups[group.degrees]
            return xfuser_backend.XfuserAttention(xfuser_group, kernel, grid.tokens, heads)
        return NativeAttention(group, kernel, grid.tokens, heads, self.settings.overlap)

    def _before_block(self, leader: int, residence: Residence) -> Callable[[int], None]:
        """The cancel check of one request (see gate.py), then the block's weights."""
        launched: deque[torch.cuda.Event] = deque()

        def check(block: int) -> None:
            if self.device.type == "cuda":
                launched.append(torch.cuda.Event(blocking=True))
                launched[-1].record()
                if len(launched) > _BLOCKS_AHEAD:
                    launched.popleft().synchronize()
            self.gate.check(self.rank, leader)
            residence.before_block(block)

        return check

    def _note_peak(self) -> None:
        self.peak_private = max(self.peak_private, _private_bytes())

    def _weight(self, source: WeightSource, spec: ModelSpec, name: str, patches: Sequence[WeightPatch] = ()) -> Weight:
        weight = source.tensor(name)
        if patches:
            weight = change(weight.to(self.device), patches)
        return place(weight, WEIGHT_DTYPES[spec.weight_dtype], self.device, name)

    def _unplaced(self, source: WeightSource, spec: ModelSpec, name: str) -> tuple[Weight, torch.dtype | None]:
        """A weight before `place`, and the dtype in which that holds it; None where it is what it shall be."""
        weight, dtype = source.tensor(name), WEIGHT_DTYPES[spec.weight_dtype]
        if not isinstance(weight, torch.Tensor):
            return weight, None
        if is_quantized_at_load(name, weight.ndim, dtype):
            return place(weight, dtype, self.device, name), None
        return weight, held_dtype(weight.ndim, dtype)

    def _weight_patch(self, arena: ArenaRef, ref: PatchRef) -> WeightPatch:
        tensors = [self.arena.view(arena, t) for t in ref.tensors]
        match ref.kind:
            case "LowRank":
                return LowRank(*tensors, scale=ref.scale, base_scale=ref.base_scale)
            case "Difference":
                return Difference(*tensors, scale=ref.scale, base_scale=ref.base_scale)
            case _:
                return Replacement(*tensors)

    def _conditioning(self, ref: ConditioningRef | None, batch: int) -> Conditioning:
        """The conditioning of a batch, left in the arena: the model fetches what belongs to its tokens."""
        if ref is None:
            return NOTHING
        views = {name: self.conditioning.view(ref.arena, tensor) for name, tensor in ref.tensors.items()}
        shared = {name: view.expand(batch, *view.shape[1:]) for name, view in views.items()}
        return Conditioning(**shared, options=ref.options)

    def _input(self, arena: ArenaRef, ref: TensorRef) -> torch.Tensor:
        return self.arena.view(arena, ref).to(self.device)


def main(rank: int, start: bytes, connection: Connection, store: str, gate: str) -> None:
    """Entry of a worker process: join, say so, serve until the launcher closes the connection."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"[WanParallel rank {rank}] %(message)s", force=True
    )
    message = decode(start)
    assert isinstance(message, Start)
    settings = message.settings
    try:
        _join_world(rank, settings, store)
        worker = Worker(rank, settings, Gate(gate))
    except Exception as error:  # the boundary of the process, as in Worker.handle
        log.exception("The start failed.")
        connection.send_bytes(encode(Reply(0, rank, kind=type(error).__name__, error=str(error))))
        return
    connection.send_bytes(encode(_ready(worker)))
    while True:
        try:
            request = decode(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(encode(worker.handle(request)))


def _join_world(rank: int, settings: PoolSettings, store: str) -> None:
    world_size = settings.plan.num_gpus
    device_id = None
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
        torch.cuda.set_per_process_memory_fraction(settings.memory_fraction)
        device_id = torch.device("cuda", rank)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    if world_size > 1:
        dist.init_process_group(
            "nccl" if settings.device == "cuda" else "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            device_id=device_id,
        )


def _ready(worker: Worker) -> Ready:
    try:
        xfuser = importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError:
        xfuser = ""
    return Ready(worker.rank, os.getpid(), _device_name(worker.device), torch.__version__, xfuser)


def _write(out: torch.Tensor, items: slice, part: Part, result: torch.Tensor) -> None:
    """Put result [b, n, c] of some items and tokens into out [B, tokens, c] on the CPU."""
    if isinstance(part, slice):
        out[items, part].copy_(result)
    else:
        out[items].index_copy_(1, part.cpu(), result.to(out.device))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use and in all; on a CPU, of this process and of the host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, pages * size


def _private_bytes() -> int:
    """Host memory of this process that no other shares."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _host_room() -> int:
    """Bytes of host memory that weights may take: what is available less a reserve for everybody else."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return available - total // 20


def _step_out(residence: Residence, nbytes: float) -> int:
    """As `Residence.step_out`, where host memory has room."""
    needed, room = residence.host_bytes_for(nbytes), _host_room()
    if needed > room:
        raise PlacementError(
            f"Weights of {needed / 2**30:.1f} GiB must step out to host memory, which has {max(0, room) / 2**30:.1f} "
            "GiB for them. Close other programs, or unload models."
        )
    return residence.step_out(nbytes)


def _out_of_memory(device: torch.device, error: torch.OutOfMemoryError) -> str:
    used, total = _device_memory(device)
    return (
        f"{device} ran out of memory ({used / 2**30:.1f} of {total / 2**30:.1f} GiB in use; "
        f"{str(error).splitlines()[0]}) "
        "Use fewer frames or a smaller size, lower max_sequence_length, or share the video among more GPUs."
    )
