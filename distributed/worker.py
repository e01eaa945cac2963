"""One process per GPU: joins the group, holds its part of the weights, answers requests one after the other."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from ..wanvideo import fp8_mode, pointwise
from ..wanvideo.attention import AttentionError
from ..wanvideo.checkpoint import held_as
from ..wanvideo.conditioning import NOTHING, Conditioning
from ..wanvideo.config import CheckpointError
from ..wanvideo.fp8 import Fp8Error
from ..wanvideo.grid import Grid, Part, pad_to_patch, patchify, sequence_of
from ..wanvideo.layers import SelfAttention
from ..wanvideo.lora import PatchError
from ..wanvideo.model import WanModel
from ..wanvideo.talk import OverSequence
from ..wanvideo.vae_ops import VAEError
from . import stopwatch, xfuser_backend
from .arena import ArenaReader
from .cost import Machine
from .displaced import FillAttention, PatchParallel, StaleAttention, StaleError
from .gate import Cancelled, Gate
from .host_exchange import HostMemoryError
from .links import link_kind
from .mailbox import Mailbox, open_mailbox
from .memory import PlacementError
from .memory_use import MemoryMeter
from .messages import Exchange, Ready, Reply, Start, decode, encode
from .models import LoadedModel, Models
from .overlapped import OverlappedAttention
from .pipefusion import PatchStream
from .pipeline import Flow, Stage
from .plan import ParallelPlan, Place, PlanError, SequenceDegrees, bounds
from .refs import ArenaRef, TensorRef
from .requests import (
    DecodeVAE,
    Displaced,
    Divide,
    EncodeVAE,
    Forward,
    Load,
    LoadVAE,
    Patch,
    Report,
    Request,
    StepOut,
    Survey,
    Trim,
    Unload,
)
from .residence import Residence
from .schedule import EXACT
from .sequence import (
    MissingPackage,
    NativeAttention,
    SequenceGroup,
    join_group,
    leave_groups,
    over_sequence,
    own_process_group,
    place_in,
)
from .specs import ModelSpec, PoolSettings
from .statuses import ModelStatus, Surveyed, WorkerStatus
from .survey import survey
from .tensor import TensorShard
from .vae import VAEs

log = logging.getLogger(__name__)
_BLOCKS_AHEAD = 2
"""How far the host may run ahead of its GPU: else it had passed every cancel check before the first block ran."""

_FOR_THE_USER = (
    AttentionError,
    CheckpointError,
    Fp8Error,
    HostMemoryError,
    MissingPackage,
    PatchError,
    PlacementError,
    PlanError,
    StaleError,
    VAEError,
    xfuser_backend.BackendError,
)
"""Errors whose text says what is wrong and what to do; others are told with their traceback in the console."""


@dataclass(frozen=True)
class Portion:
    """Some batch items and tokens of one forward, as this rank works on them."""

    items: slice
    part: Part
    tokens: int
    attend: SelfAttention


class Worker:
    """Executes requests; every method that the ranks run together makes the same collective calls on all.

    Args:
        device: that of `settings` without; benchmarks/simulation.py has one that only counts.
    """

    def __init__(self, rank: int, settings: PoolSettings, gate: Gate, device: torch.device | None = None):
        self.rank, self.settings, self.gate = rank, settings, gate
        self.device = device or (torch.device("cuda", rank) if settings.device == "cuda" else torch.device("cpu"))
        self.place = settings.plan.place(rank)
        self.shard, self.stage = self._join_divided()
        self.groups: dict[SequenceDegrees, SequenceGroup] = {}
        self.xfuser_groups: dict[SequenceDegrees, xfuser_backend.XfuserGroup] = {}
        self.mailboxes: dict[SequenceDegrees, Mailbox] = {}
        self.joined: dict[Hashable, tuple[SequenceGroup, Mailbox | None]] = {}  # by degrees and members
        self.patches = PatchParallel(rank, settings.plan, self.device)
        streamed = settings.pipeline_mode == "pipefusion" and settings.plan.pipeline_parallel > 1
        self.stream = PatchStream(settings.plan.pipeline_parallel, self.device) if streamed else None
        self.arena = ArenaReader()
        self.conditioning = ArenaReader()
        self.kept: tuple[object, dict] = (None, {})  # what the model has computed from the conditioning of that key
        self.models = Models(rank, settings, self.device, self.shard, self.stage)
        self.memory = MemoryMeter(self.device)
        self.vaes = VAEs(rank, settings, self.device, gate, self.models)
        self.fused = pointwise.use_triton(self.device)
        self.machine: Machine | None = None

    def handle(self, request: Request) -> Reply:
        """Answer one request; errors of the request become part of the reply."""
        started = time.perf_counter()
        reply = Reply(request.id, self.rank)
        try:
            with torch.inference_mode():
                match request:
                    case Load():
                        self.models.load(request.spec, request.tokens, self._join_groups)
                        reply = replace(reply, patches=self.models.loaded[request.spec].uuid)
                    case Patch():
                        self.models.patch(request, self.arena)
                    case Forward():
                        reply = self._measured(request, reply)
                    case LoadVAE():
                        self.vaes.load(request)
                    case DecodeVAE():
                        self.vaes.decode(request)
                    case EncodeVAE():
                        self.vaes.encode(request)
                    case Trim():
                        self.trim()
                    case Unload():
                        self.unload(request.specs)
                    case StepOut():
                        self.models.step_out(request)
                    case Report():
                        reply = replace(reply, status=self.status())
                    case Survey():
                        reply = replace(reply, surveyed=self.survey())
                    case Divide():
                        self.divide(request.plan)
        except Cancelled:
            self.trim()  # the client will not wait to ask for it
            reply = replace(reply, cancelled=True)
        except torch.OutOfMemoryError as error:
            if isinstance(request, Forward):
                self.models.learn(request.spec)
            reply = replace(reply, kind="OutOfMemory", error=_out_of_memory(self.device, error))
        except _FOR_THE_USER as error:
            reply = replace(reply, kind=type(error).__name__, error=str(error))
        except Exception as error:  # the boundary of the process: whatever it is, the client must hear of it
            log.exception("A request failed.")
            reply = replace(reply, kind=type(error).__name__, error=str(error) or type(error).__name__)
        seconds, held = time.perf_counter() - started, self.models.held()
        return replace(reply, seconds=seconds, weights=held, vaes=self.vaes.keys)

    def _measured(self, request: Forward, reply: Reply) -> Reply:
        """Run a forward; the reply with what it exchanged and where its time went."""
        self.memory.last = None
        with stopwatch.measuring(self.device) as watch:
            reply = replace(reply, exchange=self.forward(request), stalls=watch.stalls())
        self.memory.end(*self._held_bytes())
        return reply

    def forward(self, request: Forward) -> Exchange | None:
        """Run this rank's batch items and tokens, and write the result where the client reads it."""
        loaded, plan = self.models.loaded[request.spec], self.settings.plan
        with stopwatch.standing(stopwatch.LATENTS):
            x, timestep, context = (
                self._input(request.arena, ref) for ref in (request.x, request.timestep, request.context)
            )
        conditioning = self._conditioning(request, len(x))
        grid = sequence_of(x, conditioning.options)
        ranks = plan.group_ranks(len(x))
        group = self.groups[plan.sequence_degrees(loaded.model.config.num_heads, ranks)]
        tokens = patchify(pad_to_patch(x))
        out = self.arena.view(request.arena, request.out)
        start, stop = group.shard(grid.tokens)
        if conditioning.speakers is not None:
            loaded.model.over_sequence = self._over_sequence(group)
        step = self._begin(request.displaced, loaded.model, conditioning, grid, ranks)
        self.gate.begin(request.id)
        batches = self._batches(request.spec, len(x), self.place.data)
        with stopwatch.standing(stopwatch.WEIGHTS):
            kept = self._to_keep(step, batches, loaded.model, grid, group)
            self.models.settle(request.spec, stop - start, kept, len(conditioning.options.vace_strengths))
        self.memory.begin()
        portions = [
            portion for items in batches for portion in self._portions(items, step, loaded.model, grid, group)
        ]
        residence = loaded.residence
        # ranks that gather weights from each other run the blocks equally often, and leave them together
        together = residence.group.ranks > ranks
        missing = self._most_batches(request.spec, len(x)) - len(batches) if together else 0
        idle = missing * len(portions) // len(batches)
        before_block = self._before_block(residence, len(x), together)
        flow = self._flow(portions, idle, loaded.model, conditioning, before_block)
        with residence.passes(len(portions) + idle):
            for portion, stream in flow:
                items, part = portion.items, portion.part
                try:
                    result = loaded.model.transform(
                        tokens[items, part] if stream is None else stream,
                        grid,
                        part,
                        timestep[items],
                        context[items],
                        portion.attend,
                        flow.before_block,
                        conditioning.items(items),
                    )
                finally:
                    if isinstance(portion.attend, FillAttention | StaleAttention):
                        portion.attend.finish()
                flow.pass_on(result)
                if self.stage.is_last and self.place.tensor == 0:  # tensor-parallel ranks have the same result
                    with stopwatch.standing(stopwatch.LATENTS):
                        _write(out, items, part, result)
        stale = [portion.attend for portion in portions if isinstance(portion.attend, StaleAttention)]
        return self.patches.report(stale) if stale else None

    def unload(self, specs: Iterable[ModelSpec]) -> None:
        """Drop the weights of these models and give their memory back to the device."""
        self.kept = (None, {})
        self.models.drop(specs)
        self.memory.last = None  # it speaks of weights that are gone
        self.vaes.drop()
        if not self.models.loaded:
            self.patches.close()
        self.models.give_back()

    def trim(self) -> None:
        """Give back what only a sampling run needs: displaced patches, the blocks in passing, what the exchanges write
        to, and torch's cache."""
        self.patches.clear()
        self.kept = (None, {})
        if self.stream is not None:
            self.stream.clear()
        for mailbox in self.mailboxes.values():
            mailbox.close()
        self.models.give_back()

    def survey(self) -> Surveyed:
        """What the machine does, measured the first time, and what there is room for (a collective call)."""
        if self.machine is None:
            self.machine = survey(self.device, self.settings.plan.num_gpus, self._link)
            self.models.give_back()
        return Surveyed(self.machine, *self.models.rooms(), self._link)

    def divide(self, plan: ParallelPlan) -> None:
        """Share the GPUs out as `plan` says (a collective call). Models that it divides otherwise are forgotten."""
        before, self.settings = self.settings.plan, replace(self.settings, plan=plan)
        self.place = plan.place(self.rank)
        for mailbox in self.mailboxes.values():
            mailbox.close()
        self.groups.clear()
        self.mailboxes.clear()
        if plan.holds_as(before):
            self.models.settings = self.settings
        else:
            self.unload(list(self.models.loaded))
            leave_groups(self._process_groups())
            self.joined.clear()
            self.shard, self.stage = self._join_divided()
            self.models = self.vaes.models = Models(self.rank, self.settings, self.device, self.shard, self.stage)
        for loaded in self.models.loaded.values():
            self._join_groups(loaded.source.config.num_heads)

    def _process_groups(self) -> Iterator[dist.ProcessGroup | None]:
        for group, _ in self.joined.values():
            yield from (group.ulysses, group.ring)
        yield from (self.shard.group, self.shard.overlapped, self.stage.group)
        yield from self.models.process_groups()

    @property
    def _link(self) -> str:
        return link_kind(self.device, self.settings.plan.num_gpus)

    def status(self) -> WorkerStatus:
        used, total = _device_memory(self.device)
        return WorkerStatus(
            rank=self.rank,
            pid=os.getpid(),
            device=_device_name(self.device),
            used=used,
            total=total,
            peak_private=self.models.peak_private,
            fused=self.fused,
            models=tuple(self._model_status(spec, loaded) for spec, loaded in self.models.loaded.items()),
            link=self._link,
            peak_allocated=self.memory.peak_allocated,
            memory=self.memory.last or self.memory.use(*self._held_bytes()),
            peak_reserved=self.memory.peak_reserved,
            vae_bytes=self.vaes.nbytes,
        )

    def _held_bytes(self) -> tuple[int, int, int]:
        """Bytes on the device of weights, of keys and values that are kept between steps, and of mailboxes."""
        kept = self.patches.nbytes + (self.stream.nbytes if self.stream is not None else 0)
        weights = self.models.device_bytes + self.vaes.nbytes
        return weights, kept, sum(mailbox.nbytes for mailbox in self.mailboxes.values())

    def _model_status(self, spec: ModelSpec, loaded: LoadedModel) -> ModelStatus:
        plan = self.settings.plan
        degrees = plan.sequence_degrees(loaded.model.config.num_heads)
        return ModelStatus(
            name=spec.name,
            weight_dtype=held_as(loaded.source.header, spec.weight_dtype),
            compute_dtype=spec.compute_dtype,
            kernel=loaded.model.kernel.name,
            backend="xfuser" if self.settings.usp_backend == "xfuser" else "native",
            ulysses=degrees.ulysses,
            ring=degrees.ring,
            patches=loaded.uuid,
            tensor=plan.tensor_parallel,
            pipeline=plan.pipeline_parallel,
            placement=loaded.placement.reason,
            device_bytes=loaded.device_bytes,
            host_bytes=loaded.residence.host_bytes,
            fp8=fp8_mode.describe(loaded.model, spec.fp8_mode, self.device),
            overlapped=degrees in self.mailboxes,
            moved_in=loaded.residence.moved_in,
            moved_out=loaded.residence.moved_out,
        )

    def _join_divided(self) -> tuple[TensorShard, Stage]:
        """This rank's part of the matrices and of the blocks, with the process groups that belong to them."""
        plan = self.settings.plan
        groups = plan.tensor_groups()
        tensor_group = own_process_group(groups, self.rank)
        overlapped = own_process_group(groups, self.rank) if self.settings.overlap else None
        pipelines = plan.pipelines()
        ranks = next(ranks for ranks in pipelines if self.rank in ranks)
        return (
            TensorShard(plan.tensor_parallel, self.place.tensor, tensor_group, overlapped),
            Stage(self.place.stage, ranks, own_process_group(pipelines, self.rank)),
        )

    def _join_groups(self, num_heads: int) -> None:
        """Make the process groups that a model of `num_heads` heads will use, for each size of group."""
        plan = self.settings.plan
        for ranks in sorted({plan.sequence_ranks, plan.sequence_ranks * plan.data_parallel}):
            degrees, members = plan.sequence_degrees(num_heads, ranks), plan.sequence_groups(ranks)
            if degrees in self.groups:
                continue
            if self.settings.usp_backend == "xfuser" and degrees.ranks > 1:
                self.xfuser_groups[degrees] = xfuser_backend.join_group(degrees, self.device)
                self.groups[degrees] = place_in(degrees, self.rank, members)
            else:
                self.groups[degrees], mailbox = self._joined(degrees, members)
                if mailbox is not None:
                    self.mailboxes[degrees] = mailbox

    def _joined(
        self, degrees: SequenceDegrees, members: Sequence[tuple[int, ...]]
    ) -> tuple[SequenceGroup, Mailbox | None]:
        """The process groups of `degrees` for these ranks; those of an earlier plan are kept for when it returns."""
        key = (degrees, *members)
        if key not in self.joined:
            group, mailbox = join_group(degrees, self.rank, members), None
            if self.settings.overlap and degrees.ulysses > 1 and degrees.ring == 1:
                mailbox = open_mailbox(group.ulysses, self.device)
            self.joined[key] = group, mailbox
        return self.joined[key]

    def _batches(self, spec: ModelSpec, batch: int, data: int) -> list[slice]:
        """The batch items of a data-parallel group, as many in each slice as go through the model at once."""
        plan = self.settings.plan
        if batch < plan.data_parallel:  # all groups work on each item together
            first, last = 0, batch
        else:
            first, last = bounds(batch, plan.data_parallel, data)
        step = min(spec.max_batch, math.ceil((last - first) / plan.pipeline_parallel))  # more slices fill a pipeline
        return [slice(start, min(start + step, last)) for start in range(first, last, step)]

    def _begin(
        self, step: Displaced | None, model: WanModel, conditioning: Conditioning, grid: Grid, ranks: int
    ) -> Displaced | None:
        """Begin an approximate step; None where it is computed exactly.

        Keys and values are kept of all blocks or none. Displaced patches have none of VACE's streams, nor of what lies
        behind the video. Where the speakers are is asked of all tokens of a block together.
        """
        layers = range(model.config.num_layers)
        if step is None or set(conditioning.options.skip_blocks) & set(layers) or conditioning.speakers is not None:
            return None
        if self.stream is not None:
            self.stream.begin(step, model.self_attentions(conditioning, model.span))
            return step
        if ranks == 1 or grid.tail or model.self_attentions(conditioning, layers) > len(layers):
            return None
        self.patches.begin(step)
        return step

    def _portions(
        self, items: slice, step: Displaced | None, model: WanModel, grid: Grid, group: SequenceGroup
    ) -> list[Portion]:
        """What this rank does for some batch items: its tokens, and how they see the others."""
        attend, start, stop = self._attention(group, model, grid), *group.shard(grid.tokens)
        if step is None or step.kind == EXACT:
            return [Portion(items, slice(start, stop), stop - start, attend)]
        if self.stream is not None:
            heads = model.config.num_heads // self.shard.size
            stretches = self.stream.stretches(step, step.lanes[items], model, grid, group, heads)
            return [Portion(items, slice(s.start, s.stop), s.stop - s.start, s.attend) for s in stretches]
        attend = self.patches.attention(step, step.lanes[items], model, grid, group, attend)
        part = attend.part
        return [Portion(items, part, part.stop - part.start if isinstance(part, slice) else len(part), attend)]

    def _to_keep(
        self, step: Displaced | None, batches: Sequence[slice], model: WanModel, grid: Grid, group: SequenceGroup
    ) -> int:
        """Bytes of keys and values that this forward will keep anew."""
        if self.stream is None or step is None or step.kind == EXACT:
            return 0
        lanes = [step.lanes[items] for items in batches]
        return self.stream.missing_bytes(lanes, model, grid, group, model.config.num_heads // self.shard.size)

    def _most_batches(self, spec: ModelSpec, batch: int) -> int:
        """Slices of batch items in the data-parallel group that has most of them."""
        return max(len(self._batches(spec, batch, data)) for data in range(self.settings.plan.data_parallel))

    def _flow(
        self,
        portions: Sequence[Portion],
        idle: int,
        model: WanModel,
        conditioning: Conditioning,
        before_block: Callable[[int, int | None], None],
    ) -> Flow[Portion]:
        """The portions of this rank on their way through its stage."""
        carried = model.carried(model.span.start, conditioning)
        streams = (1 + carried,) if carried else ()
        return Flow(
            self.stage,
            portions,
            self.stage.most_blocks(model.config),
            lambda portion: (*streams, portion.items.stop - portion.items.start, portion.tokens, model.config.dim),
            self.device,
            before_block,
            idle,
            model.config.in_turn(model.span),
        )

    def _attention(self, group: SequenceGroup, model: WanModel, grid: Grid) -> SelfAttention:
        kernel, heads = model.self_kernel, model.config.num_heads // self.shard.size
        if group.degrees.ranks == 1:
            return kernel
        if group.degrees in self.xfuser_groups:
            xfuser_group = self.xfuser_groups[group.degrees]
            return xfuser_backend.XfuserAttention(xfuser_group, kernel, grid.tokens, heads)
        if group.degrees in self.mailboxes:
            return OverlappedAttention(group, kernel, grid.tokens, heads, self.mailboxes[group.degrees])
        return NativeAttention(group, kernel, grid.tokens, heads, self.settings.overlap)

    def _over_sequence(self, group: SequenceGroup) -> OverSequence | None:
        joined = self.xfuser_groups.get(group.degrees, group)
        return over_sequence(joined.ulysses, joined.ring) if group.degrees.ranks > 1 else None

    def _before_block(
        self, residence: Residence, batch: int, together: bool
    ) -> Callable[[int, int | None], None]:
        """Called with the stage that decides and the block that comes next, if this rank has one: the cancel check of
        one request (see gate.py), then the block's weights."""
        plan = self.settings.plan
        data = 0 if together or batch < plan.data_parallel else self.place.data  # the first of those that work together
        leaders = [plan.rank_at(Place(data, stage, 0, 0)) for stage in range(plan.pipeline_parallel)]
        launched: deque[torch.cuda.Event] = deque()

        def check(stage: int, block: int | None) -> None:
            if self.device.type == "cuda":
                launched.append(torch.cuda.Event(blocking=True))
                launched[-1].record()
                if len(launched) > _BLOCKS_AHEAD:
                    launched.popleft().synchronize()
            with stopwatch.standing(stopwatch.GATE, sorted({self.rank, leaders[stage]})):
                self.gate.check(self.rank, leaders[stage])
            if block is not None:
                residence.before_block(block)

        return check

    def _conditioning(self, request: Forward, batch: int) -> Conditioning:
        """The conditioning of a batch, left in the arena: the model fetches what belongs to its tokens."""
        ref = request.conditioning
        if ref is None:
            return NOTHING
        views = {name: self.conditioning.view(ref.arena, tensor) for name, tensor in ref.tensors.items()}
        shared = {name: view.expand(batch, *view.shape[1:]) for name, view in views.items()}
        key = (ref.arena, request.spec, self.models.loaded[request.spec].uuid, batch)
        if self.kept[0] != key:
            self.kept = (key, {})
        return Conditioning(**shared, options=ref.options, kept=self.kept[1])

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
    """Put result [b, n, c] of some items and tokens into out [B, tokens of the video, c] on the CPU."""
    if isinstance(part, slice):
        video = out[items, part]  # without the tail of a sequence
        video.copy_(result[:, : video.shape[1]])
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


def _out_of_memory(device: torch.device, error: torch.OutOfMemoryError) -> str:
    used, total = _device_memory(device)
    return (
        f"{device} ran out of memory ({used / 2**30:.1f} of {total / 2**30:.1f} GiB in use; "
        f"{str(error).splitlines()[0]}) "
        "Use fewer frames or a smaller size, lower max_sequence_length, or share the video among more GPUs."
    )
