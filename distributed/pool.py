"""The client's handle on a pool: starts it lazily, sends it one request at a time, brings it back when it died."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..wanvideo.attention import AttentionError
from ..wanvideo.checkpoint import DTYPES, RANDOM_PREFIX, random_config
from ..wanvideo.conditioning import NOTHING, Conditioning, check, core, extended
from ..wanvideo.config import CheckpointError, WanConfig
from ..wanvideo.files import model_files
from ..wanvideo.grid import grid_of, sequence_of, unpatchify
from ..wanvideo.lora import Difference, LowRank, WeightPatch
from ..wanvideo.vace_module import read_model
from .arena import Arena, needed
from .conditioning import SharedConditioning
from .division import most_held
from .memory import PlacementError
from .messages import Cancel, Exchange, PoolFailed, PoolReady, Ready, Replies, Reply, decode, encode
from .plan import ParallelPlan, PlanError
from .planner import Kind, Planner
from .processes import PoolProcesses
from .refs import PatchRef
from .requests import Displaced, Divide, Forward, Load, Patch, Report, Request, StepOut, Survey, Trim, Unload
from .specs import ModelSpec, PoolSettings
from .statuses import HeldWeights, Surveyed, WorkerStatus
from .stopwatch import RankTimes, rank_times

log = logging.getLogger(__name__)

Poll = Callable[[], None]
"""Called while waiting; it may raise to give the request up (Cancel)."""

_POLL_SECONDS = 0.1


class PoolError(RuntimeError):
    """A request failed. The pool can be used again."""


class WorkerDied(PoolError):
    """A process of the pool has ended; the next request starts a new pool."""


class OutOfMemory(PoolError):
    """A GPU had too little memory for the request."""


_ERRORS = {cls.__name__: cls for cls in (CheckpointError, AttentionError, PlanError, PlacementError, OutOfMemory)}
_WORKERS_OWN = ("BackendError", "HostMemoryError", "MissingPackage", "PatchError", "StaleError", "VAEError")
_ERRORS |= dict.fromkeys(_WORKERS_OWN, PoolError)


@dataclass(frozen=True)
class PatchSet:
    """The changes that LoRAs make to a model's weights.

    Args:
        uuid: another one for every other set; the workers merge when it changes. "" means none.
        build: gives the patches by weight name; only called when the workers need them.
    """

    uuid: str
    build: Callable[[], Mapping[str, Sequence[WeightPatch]]]


NO_PATCHES = PatchSet("", dict)
_MIXED = "mixed"  # no set has this uuid: one rank failed to merge what the others have, so all merge anew


@dataclass(frozen=True)
class PoolStatus:
    """What a status shows.

    Args:
        state: "not started", "ready" or "ended".
        times: where the seconds of the last forward went, by rank. Empty, and the seconds 0, where there was none yet,
            or where the last one failed or was given up; `failed` tells which.
    """

    state: str
    settings: PoolSettings
    launcher_pid: int = 0
    torch: str = ""
    xfuser: str = ""
    workers: tuple[WorkerStatus, ...] = ()
    last_forward_seconds: float = 0.0
    last_hop_seconds: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    times: tuple[RankTimes, ...] = ()
    failed: bool = False
    plan_reason: str = ""  # why this plan was chosen; "" where it was set


def acquire(settings: PoolSettings) -> Pool:
    """The pool of these settings; nothing is started until it is used.

    A pool lives as long as somebody holds it. The one asked for last is held here too, so that it outlives a
    graph that is built anew for each prompt.

    Raises:
        PlanError: the plan cannot work.
    """
    global _recent
    Planner(settings).first_plan.validate()
    with _registry_lock:
        pool = _pools.get(settings)
        if pool is None:
            pool = _pools[settings] = Pool(settings)
        _recent = pool
        return pool


_pools: weakref.WeakValueDictionary[PoolSettings, Pool] = weakref.WeakValueDictionary()
_recent: Pool | None = None
_registry_lock = threading.Lock()


def running() -> Pool | None:
    """A pool whose workers run: the one asked for last, if it is one of them."""
    with _registry_lock:
        pools = [pool for pool in (_recent, *_pools.values()) if pool is not None and pool.alive]
        return pools[0] if pools else None


def file_stamp(path: str) -> str:
    """Changes when the file does, or one of a folder's; "" for random weights."""
    if path.startswith(RANDOM_PREFIX):
        return ""
    stats = [os.stat(file) for file in model_files(path)]
    return f"{max(stat.st_mtime_ns for stat in stats)}-{sum(stat.st_size for stat in stats)}"


class Pool:
    """Workers that run DiT forwards together. Use `acquire` to get one.

    Every method starts what it needs. One request runs at a time; other threads wait their turn.
    """

    def __init__(self, settings: PoolSettings):
        settings = _resolved(settings)
        self._planner = Planner(settings)
        self.settings = replace(settings, plan=self._planner.first_plan)
        self._lock = threading.RLock()
        self._processes: PoolProcesses | None = None
        self._finalizer: weakref.finalize | None = None
        self._loaded: dict[ModelSpec, str] = {}  # to the uuid of the patches merged
        self._users: Counter[ModelSpec] = Counter()
        self._dropped: set[ModelSpec] = set()
        self._held: dict[ModelSpec, tuple[HeldWeights, ...]] = {}  # by rank, as the workers said last
        self._aside: set[ModelSpec] = set()  # stepped out for somebody else's sake, and not back yet
        self._arena: Arena | None = None
        self._conditioning = SharedConditioning()
        self._lent: tuple[Arena, ...] = ()  # to a request that has not been seen to end
        self._vaes: frozenset[str] = frozenset()
        self._next_id = 0
        self._abandoned = 0  # id of a request whose reply nobody waits for, or 0
        self._untidy = False  # a request failed or was given up, and the workers have not been trimmed since
        self._failed = False  # the last forward was
        self._forget_forward()

    def _forget_forward(self) -> None:
        self._seconds = self._hop = 0.0
        self._exchanges: tuple[Exchange, ...] = ()
        self._times: tuple[RankTimes, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether the processes have been started and none has been seen to end."""
        return self._processes is not None and self._processes.launcher.poll() is None

    @property
    def launcher_pid(self) -> int:
        """Process id of the launcher; 0 while there is none."""
        return self._processes.launcher.pid if self._processes else 0

    @property
    def workers(self) -> tuple[Ready, ...]:
        """The workers as they said hello; empty until they have."""
        return self._processes.ready.workers if self._processes and self._processes.ready else ()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers, by rank."""
        return tuple(worker.pid for worker in self.workers)

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """What the last forward exchanged, by rank; empty unless it used stale keys and values."""
        return self._exchanges

    @property
    def times(self) -> tuple[RankTimes, ...]:
        """Where the seconds of the last forward went, by rank, as in `PoolStatus`; asks nobody."""
        return self._times

    def check(self, spec: ModelSpec) -> None:
        """Check that the model can be divided as was asked for, as `forward` does. Starts nothing.

        Raises:
            CheckpointError, PlanError: it cannot.
        """
        self._planner.check(_config_of(spec), Kind(spec, 0, 1))

    def ensure_ready(
        self,
        spec: ModelSpec,
        poll: Poll | None = None,
        make_room: Callable[[int], None] | None = None,
        tokens: int = 0,
        items: int = 1,
    ) -> None:
        """Start the workers and load a model, as `forward` does by itself. Arguments and errors as there.

        `tokens` is the length of the video to come, beside which the weights must fit; 0 is 81 frames at 480p.
        `items` is how many there are in a forward, which an automatic plan depends on.
        """
        kind = Kind(spec, tokens, items)
        self._planner.check(_config_of(spec), kind)
        with self._lock:
            self._ensure_started(poll)
            self._ensure_planned(kind, poll, make_room)
            self._ensure_loaded(kind, poll, make_room)

    def forward(
        self,
        spec: ModelSpec,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        patches: PatchSet | None = None,
        poll: Poll | None = None,
        make_room: Callable[[int], None] | None = None,
        displaced: Displaced | None = None,
        conditioning: Conditioning = NOTHING,
    ) -> torch.Tensor:
        """One DiT forward on all workers (see `WanModel.forward`).

        Args:
            spec: the model; it is loaded where the workers don't have it.
            x: latent [B, in_dim, T, H, W], any float dtype and device.
            timestep: sigma * 1000, [B] or [B, T].
            context: [B, L, text_dim].
            patches: LoRA changes; merged where the workers' are others.
            poll: called at least every 0.1 s while waiting. What it raises is passed on, the workers drop the
                request, and the pool stays usable.
            make_room: called with the bytes that each GPU will need, before a model is loaded on GPUs.
            displaced: the forward's part in displaced patch parallelism (see schedule.py); exact without.
            conditioning: further inputs of some variants, each with B items.

        Returns:
            float32 [B, out_dim, T, H, W] on the device of x.

        Raises:
            WorkerDied: a process ended; the next call starts a new pool.
            PoolError: the workers refused or failed.
            CheckpointError, AttentionError, PlanError, PlacementError: the model cannot run like this.
            ValueError: an input has the wrong shape.
        """
        config = _config_of(spec)
        self._planner.check(config, Kind(spec, 0, len(x)))
        frames = x.shape[2] if x.ndim == 5 else 0
        _check_inputs(config, x, context)
        check(config, x, conditioning)
        x, conditioning = extended(x, conditioning)
        _check_timestep(x, timestep)
        kind = Kind(spec, sequence_of(x, conditioning.options).tokens, len(x))
        with self._lock:
            self._forget_forward()
            self._failed = True  # until it is done
            self._ensure_started(poll)
            self._ensure_planned(kind, poll, make_room)
            self._ensure_loaded(kind, poll, make_room)
            self._ensure_patched(spec, patches or NO_PATCHES, poll)
            started = time.perf_counter()
            grid = grid_of(x)
            self._drain(poll)
            self._tidy(poll)
            inputs = [x.detach().float(), timestep.detach().float(), context.detach()]
            size = needed(inputs) + x.shape[0] * grid.tokens * config.out_dim * 16 + 64
            arena = self._arena_for(size, pinned=x.is_cuda and self.settings.device == "cuda")
            refs = [arena.write(tensor) for tensor in inputs]
            out = arena.allocate(torch.float32, (x.shape[0], grid.tokens, config.out_dim * 4))
            shared = self._conditioning.share(conditioning, DTYPES[spec.compute_dtype])
            request = Forward(self._new_id(), spec, arena.ref, *refs, out, displaced, shared)
            replies = self._call(request, poll)
            self._aside.discard(spec)
            result = unpatchify(arena.view(out).to(x.device, copy=True), grid, tuple(x.shape[-3:]))
            result = core(result, frames, conditioning.options)
            seconds = [reply.seconds for reply in replies.replies]
            self._times = rank_times(seconds, [reply.stalls for reply in replies.replies])
            self._seconds, self._failed = max(seconds), False
            self._hop = time.perf_counter() - started - self._seconds
            self._exchanges = tuple(reply.exchange for reply in replies.replies if reply.exchange)
            return result

    @property
    def vaes(self) -> frozenset[str]:
        """Keys of the VAEs that every worker has, as they said last."""
        return self._vaes if self.alive else frozenset()

    @contextmanager
    def session(self, poll: Poll | None = None) -> Iterator[None]:
        """Start the workers, and let no other thread's request come between those that are made inside."""
        with self._lock:
            self._ensure_started(poll)
            yield

    def ask(self, request: Callable[[int], Request], arenas: tuple[Arena, ...] = (), poll: Poll | None = None) -> float:
        """Let the workers answer what `request` makes of an id; returns the seconds of the slowest.

        Args:
            arenas: what they read and write meanwhile; closed once they no longer do. Views of them stay.
            poll: as in `forward`, as are the errors.
        """
        with self.session(poll):
            self._drain(poll)
            self._close_lent()
            self._lent = arenas
            replies = self._call(request(self._new_id()), poll)
            self._close_lent()
            return max(reply.seconds for reply in replies.replies)

    def keep(self, spec: ModelSpec) -> None:
        """Say that one more user holds this model. Models that were never kept stay until `unload`."""
        self._users[spec] += 1
        self._dropped.discard(spec)

    def drop(self, spec: ModelSpec) -> None:
        """Say that a user of this model has gone. After the last one its weights make room for the next model.

        Takes no lock and talks to nobody: it may run in a destructor.
        """
        self._users[spec] -= 1
        if self._users[spec] <= 0:
            self._dropped.add(spec)

    def unload(self, spec: ModelSpec | None = None) -> None:
        """Drop the weights of `spec`, or all, in the workers and give their GPU memory back. The processes stay."""
        with self._lock:
            if self.alive and self.workers:
                self._drain(None)
                wanted = {spec} | self._dropped if spec else set(self._loaded)
                self._unload(wanted & self._loaded.keys())

    def held(self, spec: ModelSpec, ranks: Sequence[int]) -> tuple[int, int]:
        """Bytes of a model's weights on the devices of `ranks`: now, and with all back that has stepped out.

        As the workers said last; asks nobody.
        """
        weights = self._held.get(spec, ()) if self.alive else ()
        told = [weights[rank] for rank in ranks if rank < len(weights)]
        return sum(w.now for w in told), sum(w.whole for w in told)

    def step_out(self, spec: ModelSpec, ranks: Sequence[int], nbytes: float) -> int:
        """Move weights to host memory until the devices of `ranks` have `nbytes` more each, or all of `spec`'s.

        They come back by themselves with the next forward. Returns the bytes that left all these devices.

        Raises:
            PlacementError: host memory has no room for them.
        """
        with self._lock:
            if not self.alive or not self.workers or spec not in self._loaded:
                return 0
            self._drain(None)
            before, _ = self.held(spec, ranks)
            self._call(StepOut(self._new_id(), spec, tuple(ranks), nbytes), None)
            self._aside.add(spec)
            return before - self.held(spec, ranks)[0]

    def step_aside(self, spec: ModelSpec) -> int:
        """Let every other model step out on all workers; returns the bytes that left the devices."""
        with self._lock:
            ranks = range(self.settings.plan.num_gpus)
            return sum(self.step_out(other, ranks, 2**62) for other in list(self._loaded) if other != spec)

    def trim(self) -> None:
        """Let the workers give back what only a sampling run needs; weights stay. Starts nothing.

        Does nothing while a request that was given up is still at work, as its end does the same.
        """
        with self._lock:
            if self.workers and not self._lost() and not self._abandoned:
                self._conditioning.close()
                self._call(Trim(self._new_id()), None)

    def close(self) -> None:
        """End the processes. The next request starts new ones."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()  # stops the processes, once
            self._processes = self._finalizer = None
            self._forget_forward()
            self._loaded.clear()
            self._held.clear()
            self._aside.clear()
            self._abandoned = 0
            self._vaes = frozenset()
            self._close_arena()
            self._close_lent()
            self._conditioning.close()

    def status(self) -> PoolStatus:
        """Memory, models and speed as they are now. Starts nothing."""
        with self._lock:
            if not self.workers:
                return PoolStatus("not started", self.settings)
            if self._lost():
                return PoolStatus("ended", self.settings)
            self._drain(None)
            replies = self._call(Report(self._new_id()), None)
            return PoolStatus(
                "ready",
                self.settings,
                self.launcher_pid,
                self.workers[0].torch,
                self.workers[0].xfuser,
                tuple(reply.status for reply in replies.replies),
                self._seconds,
                self._hop,
                self._exchanges,
                self._times,
                self._failed,
                self._planner.reason,
            )

    def _ensure_started(self, poll: Poll | None) -> None:
        if self._processes is not None and self._lost():
            log.warning("The pool had ended and is started again.")
            self.close()
        if self._processes is None:
            if not hasattr(os, "memfd_create"):
                raise PoolError("WanParallel's workers need Linux. On Windows, run ComfyUI inside WSL2.")
            self._processes = PoolProcesses(self.settings)
            self._finalizer = weakref.finalize(self, self._processes.stop)
        while self._processes.ready is None:
            message = self._receive(poll)
            assert isinstance(message, PoolReady)
            self._processes.ready = message
            plan, device = self.settings.plan, message.workers[0].device
            log.info("%d workers are up on %s.", plan.num_gpus, device)

    def _lost(self) -> bool:
        """Whether the launcher has ended, or says that a worker has, while nobody asked it anything."""
        if not self.alive:
            return True
        try:
            while self._processes.connection.poll(0):
                message = decode(self._processes.connection.recv_bytes())
                if isinstance(message, PoolFailed):
                    return True
                if isinstance(message, PoolReady):
                    self._processes.ready = message
                elif isinstance(message, Replies) and message.id == self._abandoned:
                    self._abandoned = 0
                    self._note(message)
        except (EOFError, ConnectionError):
            return True
        return False

    def _ensure_planned(self, kind: Kind, poll: Poll | None, make_room: Callable[[int], None] | None) -> None:
        """Let the workers run under the plan for this kind of forward."""
        plan = self._planner.recall(kind, self.settings.plan)
        if plan is None:
            self._make_room_for(kind.spec, make_room)  # before it is counted
            surveyed, loaded = self.survey(poll), bool(self._loaded)
            plan = self._planner.choose(_config_of(kind.spec), kind, surveyed, self.settings.plan, loaded)
        if plan != self.settings.plan:
            self._drain(poll)
            self._divide(plan)

    def survey(self, poll: Poll | None = None) -> tuple[Surveyed, ...]:
        """What the workers' devices do, measured the first time, and have room for, by rank. Starts the workers."""
        with self._lock:
            self._ensure_started(poll)
            self._drain(poll)
            return tuple(reply.surveyed for reply in self._call(Survey(self._new_id()), poll).replies)

    def _divide(self, plan: ParallelPlan) -> None:
        if not plan.holds_as(self.settings.plan):
            self._unload(set(self._loaded))
        try:
            self._call(Divide(self._new_id(), plan), None)
        except PoolError:
            self.close()  # the workers may be of two minds
            raise
        self.settings = replace(self.settings, plan=plan)

    def _ensure_loaded(self, kind: Kind, poll: Poll | None, make_room: Callable[[int], None] | None) -> None:
        spec = kind.spec
        self._make_room_for(spec, make_room)
        if spec in self._loaded:
            return
        started = time.perf_counter()
        log.info("Loading %s on %d workers.", spec.name, self.settings.plan.num_gpus)
        self._drain(poll)
        self._unload(self._dropped & self._loaded.keys(), poll)
        try:
            replies = self._call(Load(self._new_id(), spec, kind.tokens), poll)
        except PlacementError as error:
            ways_out = self._planner.ways_out(_config_of(spec), kind, self.survey(poll))
            raise PlacementError(f"{error}{ways_out}") from None
        merged = {reply.patches for reply in replies.replies}
        self._loaded[spec] = merged.pop() if len(merged) == 1 else _MIXED
        log.info("%s is loaded after %.1f s.", spec.name, time.perf_counter() - started)

    def _make_room_for(self, spec: ModelSpec, make_room: Callable[[int], None] | None) -> None:
        """Have room made for what is to be loaded, or to come back from host memory."""
        if make_room is None or self.settings.device != "cuda":
            return
        if spec not in self._loaded:
            make_room(most_held(_config_of(spec), spec, self.settings.plan))
        elif spec in self._aside:
            make_room(max(weights.whole - weights.now for weights in self._held[spec]))

    def _unload(self, specs: set[ModelSpec], poll: Poll | None = None) -> None:
        if specs:
            for spec in specs:
                del self._loaded[spec]
                self._aside.discard(spec)
            self._call(Unload(self._new_id(), tuple(specs)), poll)

    def _ensure_patched(self, spec: ModelSpec, patches: PatchSet, poll: Poll | None) -> None:
        if self._loaded[spec] == patches.uuid:
            return
        weights = patches.build()
        tensors = [t for changes in weights.values() for change in changes for t in _tensors(change)]
        self._drain(poll)
        arena = self._arena_for(needed(tensors))
        refs = {name: tuple(_patch_ref(arena, c) for c in changes) for name, changes in weights.items()}
        del self._loaded[spec]  # if this is interrupted or fails, the next Load tells what the workers have
        self._call(Patch(self._new_id(), spec, patches.uuid, arena.ref, refs), poll)
        self._loaded[spec] = patches.uuid
        self._close_arena()  # LoRAs are larger than latents

    def _arena_for(self, nbytes: int, pinned: bool = False) -> Arena:
        if self._arena is None or self._arena.nbytes < nbytes or self._arena.pinned < pinned:
            self._close_arena()
            self._arena = Arena(nbytes, pinned)
        self._arena.reset()
        return self._arena

    def _close_arena(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _close_lent(self) -> None:
        for arena in self._lent:
            arena.close()
        self._lent = ()

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _call(self, request: Request, poll: Poll | None) -> Replies:
        try:
            self._processes.connection.send_bytes(encode(request))
        except ConnectionError:
            self._fail(self._processes.epitaph())
        self._abandoned = request.id
        try:
            while True:
                message = self._receive(poll)
                if isinstance(message, Replies) and message.id == request.id:
                    break
        except BaseException:  # from poll (ComfyUI's interrupt is no Exception), or from a pool that ended
            if self._processes is not None:
                self._cancel(request.id)
            raise
        self._abandoned = 0
        self._note(message)
        for reply in message.replies:
            if reply.error:
                raise _error(reply)
        return message

    def _note(self, message: Replies) -> None:
        self._untidy |= any(reply.error or reply.cancelled for reply in message.replies)
        self._vaes = frozenset.intersection(*(frozenset(reply.vaes) for reply in message.replies))
        by_spec: dict[ModelSpec, list[HeldWeights]] = {}
        for reply in message.replies:
            for weights in reply.weights:
                by_spec.setdefault(weights.spec, []).append(weights)
        self._held = {spec: tuple(held) for spec, held in by_spec.items() if len(held) == len(message.replies)}

    def _tidy(self, poll: Poll | None) -> None:
        """After a forward that some ranks did not finish, let all of them drop what they had sent each other."""
        if self._untidy:
            self._call(Trim(self._new_id()), poll)
            self._untidy = False  # not where poll gave it up: then the next forward asks again

    def _cancel(self, request: int) -> None:
        try:
            self._processes.connection.send_bytes(encode(Cancel(request)))
        except ConnectionError:
            log.warning("The pool ended while a request was being cancelled.")

    def _drain(self, poll: Poll | None) -> None:
        """Wait for the reply of a request that was given up: until then the workers use the arena."""
        while self._abandoned:
            message = self._receive(poll)
            if isinstance(message, Replies) and message.id == self._abandoned:
                self._abandoned = 0
                self._note(message)

    def _receive(self, poll: Poll | None) -> object:
        connection = self._processes.connection
        try:
            while not connection.poll(_POLL_SECONDS):
                if poll is not None:
                    poll()
            message = decode(connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._fail(self._processes.epitaph())
        if isinstance(message, PoolFailed):
            self._fail(message.reason, message.kind)
        return message

    def _fail(self, reason: str, kind: str = "") -> None:
        self.close()
        if kind in _ERRORS:
            raise _ERRORS[kind](reason)
        raise WorkerDied(f"{reason} Queue the prompt again: it starts a new pool.")


def model_config(path: str, module: str = "") -> WanConfig:
    """Dimensions of a checkpoint (`module`: a file beside it) or of random weights, from the headers alone.

    Raises:
        CheckpointError: see `read_model`.
    """
    if path.startswith(RANDOM_PREFIX):
        return random_config(path.removeprefix(RANDOM_PREFIX))
    return read_model(path, module).config


@functools.lru_cache(maxsize=16)
def _config_of(spec: ModelSpec) -> WanConfig:
    """Read once for each spec: its `stamp` changes with the file."""
    return model_config(spec.path, spec.module)


def _resolved(settings: PoolSettings) -> PoolSettings:
    """With "auto" replaced by what it means here."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < settings.plan.num_gpus:
        raise PlanError(
            f"num_gpus is {settings.plan.num_gpus}, but this machine shows {torch.cuda.device_count()} GPUs. "
            "Lower num_gpus, or check nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    backend = "native" if settings.usp_backend == "auto" else settings.usp_backend
    if backend == "xfuser" and settings.plan.tensor_parallel * settings.plan.pipeline_parallel > 1:
        raise PlanError(
            "usp_backend is xfuser, which here knows sequence and data parallelism alone. "
            "Set usp_backend to native, or pipeline_parallel_size and tensor_parallel_size to 1."
        )
    auto = settings.auto and backend == "native" and settings.pipeline_mode == "exact"  # what cost.py knows about
    return replace(settings, device=device, usp_backend=backend, auto=auto)


def _check_inputs(config: WanConfig, x: torch.Tensor, context: torch.Tensor) -> None:
    if x.ndim != 5 or x.shape[1] != config.in_dim:
        raise ValueError(
            f"The latent has shape {tuple(x.shape)}, but this {config.variant} Wan model takes [batch, "
            f"{config.in_dim}, frames, height, width]. Use the latent and conditioning nodes of this variant."
        )
    if context.ndim != 3 or context.shape[-1] != config.text_dim or len(context) != len(x):
        raise ValueError(
            f"The text conditioning has shape {tuple(context.shape)}, but this model takes [{len(x)}, tokens, "
            f"{config.text_dim}]. Use CLIPLoader with type wan and the umt5-xxl text encoder."
        )


def _check_timestep(x: torch.Tensor, timestep: torch.Tensor) -> None:
    if timestep.shape not in ((len(x),), (len(x), x.shape[2])):
        raise ValueError(
            f"The timesteps have shape {tuple(timestep.shape)}, but one for each of {len(x)} batch items or for "
            f"each of their {x.shape[2]} latent frames is needed. Use a stock sampler."
        )


def _tensors(change: WeightPatch) -> tuple[torch.Tensor, ...]:
    match change:
        case LowRank():
            return change.up, change.down
        case Difference():
            return (change.diff,)
        case _:
            return (change.weight,)


def _patch_ref(arena: Arena, change: WeightPatch) -> PatchRef:
    refs = tuple(arena.write(tensor) for tensor in _tensors(change))
    kind = type(change).__name__
    if isinstance(change, LowRank | Difference):
        return PatchRef(kind, refs, change.scale, change.base_scale)
    return PatchRef(kind, refs)


def _error(reply: Reply) -> Exception:
    if reply.kind in _ERRORS:
        return _ERRORS[reply.kind](reply.error)
    return PoolError(
        f"Worker rank {reply.rank} failed with {reply.kind}: {reply.error.rstrip('.')}. "
        "The console has the details; the workers are ready for the next prompt."
    )
