"""The client's handle on a pool of workers, and the only room of it that others enter.

A `Pool` brings the workers to where a forward needs them (started, under the plan for it, loaded, patched) and runs it.
How it talks to them is in rpc.py, what they hold by its account in loaded_models.py, which plan they run under in
planner.py, and what its requests fail with in errors.py.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ...wanvideo.base.conditioning import NOTHING, Conditioning, check, core, extended
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import grid_of, sequence_of, unpatchify
from ...wanvideo.base.inputs import check_inputs, check_timestep
from ...wanvideo.checkpoint.weight_source import DTYPES, model_config
from ..comm.timing import RankTimes, rank_times
from ..parallel.partition import most_held
from ..plan.degrees import ParallelPlan
from ..plan.placement import PlacementError
from ..planner.planner import Kind, Planner, resolved
from ..protocol.messages import Ready
from ..protocol.replies import ForwardDone
from ..protocol.reports import Exchange, Surveyed, WorkerStatus
from ..protocol.requests import Displaced, Divide, Forward, Report, Request, Survey, Trim
from ..protocol.specs import ModelSpec, PoolSettings
from ..shm.arena import Arena, ReusedArena, needed
from ..weights.lora_transfer import NO_PATCHES, PatchSet
from .errors import OutOfMemory, PoolError
from .loaded_models import Holdings
from .rpc import Conversation, Poll
from .shared_conditioning import SharedConditioning

log = logging.getLogger(__name__)


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


@dataclass
class _LastForward:
    """What is known of the last forward, for `PoolStatus`."""

    seconds: float = 0.0
    hop: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    times: tuple[RankTimes, ...] = ()
    failed: bool = False

    def begin(self) -> None:
        """Another one, which has failed until it is done."""
        self.forget()
        self.failed = True

    def forget(self) -> None:
        """What it measured; not whether it failed."""
        self.seconds = self.hop = 0.0
        self.exchanges, self.times = (), ()


class Pool:
    """Workers that run DiT forwards together. Use `acquire` to get one.

    Every method starts what it needs. One request runs at a time; other threads wait their turn.
    """

    def __init__(self, settings: PoolSettings):
        settings = resolved(settings)
        self._planner = Planner(settings)
        self.settings = replace(settings, plan=self._planner.first_plan)
        self._lock = threading.RLock()
        self._conversation = Conversation()
        self._arena = ReusedArena()
        self._conditioning = SharedConditioning()
        self._holdings = Holdings(self._conversation, self._arena)
        self._last = _LastForward()
        self._conversation.at_end = (
            *(self._holdings.forget, self._last.forget),
            *(self._arena.close, self._conditioning.close),
        )
        weakref.finalize(self, self._conversation.close)  # nothing of which holds this pool

    @property
    def alive(self) -> bool:
        """Whether the processes have been started and none has been seen to end."""
        return self._conversation.alive

    @property
    def launcher_pid(self) -> int:
        """Process id of the launcher; 0 while there is none."""
        return self._conversation.launcher_pid

    @property
    def workers(self) -> tuple[Ready, ...]:
        """The workers as they said hello; empty until they have."""
        return self._conversation.workers

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers, by rank."""
        return tuple(worker.pid for worker in self.workers)

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """What the last forward exchanged, by rank; empty unless it used stale keys and values."""
        return self._last.exchanges

    @property
    def times(self) -> tuple[RankTimes, ...]:
        """Where the seconds of the last forward went, by rank, as in `PoolStatus`; asks nobody."""
        return self._last.times

    @property
    def vaes(self) -> frozenset[str]:
        """Keys of the VAEs that every worker has, as they said last."""
        return self._conversation.told.vaes if self.alive else frozenset()

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
            self._conversation.start(self.settings, poll)
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
        check_inputs(config, x, context)
        check(config, x, conditioning)
        x, conditioning = extended(x, conditioning)
        check_timestep(x, timestep)
        kind = Kind(spec, sequence_of(x, conditioning.options).tokens, len(x))
        with self._lock:
            self._last.begin()
            self._conversation.start(self.settings, poll)
            self._ensure_planned(kind, poll, make_room)
            self._ensure_loaded(kind, poll, make_room)
            self._holdings.patch(spec, patches or NO_PATCHES, poll)
            started = time.perf_counter()
            grid = grid_of(x)
            self._conversation.drain(poll)
            self._conversation.tidy(poll)
            inputs = [x.detach().float(), timestep.detach().float(), context.detach()]
            size = needed(inputs) + x.shape[0] * grid.tokens * config.out_dim * 16 + 64
            arena = self._arena.of(size, pinned=x.is_cuda and self.settings.device == "cuda")
            refs = [arena.write(tensor) for tensor in inputs]
            out = arena.allocate(torch.float32, (x.shape[0], grid.tokens, config.out_dim * 4))
            shared = self._conditioning.share(conditioning, DTYPES[spec.compute_dtype])
            replies = self._conversation.ask(
                lambda number: Forward(number, spec, arena.ref, *refs, out, displaced, shared), poll
            )
            self._holdings.came_back(spec)
            result = unpatchify(arena.view(out).to(x.device, copy=True), grid, tuple(x.shape[-3:]))
            result = core(result, frames, conditioning.options)
            last, seconds = self._last, [reply.seconds for reply in replies]
            done = [reply.outcome for reply in replies if isinstance(reply.outcome, ForwardDone)]
            last.times = rank_times(seconds, [outcome.stalls for outcome in done])
            last.seconds, last.failed = max(seconds), False
            last.hop = time.perf_counter() - started - last.seconds
            last.exchanges = tuple(outcome.exchange for outcome in done if outcome.exchange)
            return result

    @contextmanager
    def session(self, poll: Poll | None = None) -> Iterator[None]:
        """Start the workers, and let no other thread's request come between those that are made inside."""
        with self._lock:
            self._conversation.start(self.settings, poll)
            yield

    def ask(self, request: Callable[[int], Request], arenas: tuple[Arena, ...] = (), poll: Poll | None = None) -> float:
        """Let the workers answer what `request` makes of an id; returns the seconds of the slowest.

        Args:
            arenas: what they read and write meanwhile; closed once they no longer do. Views of them stay.
            poll: as in `forward`, as are the errors.
        """
        with self.session(poll):
            self._conversation.drain(poll)
            self._conversation.lend(arenas)
            replies = self._conversation.ask(request, poll)
            self._conversation.lend(())
            return max(reply.seconds for reply in replies)

    def keep(self, spec: ModelSpec) -> None:
        """Say that one more user holds this model. Models that were never kept stay until `unload`."""
        self._holdings.keep(spec)

    def drop(self, spec: ModelSpec) -> None:
        """Say that a user of this model has gone. After the last one its weights make room for the next model.

        Takes no lock and talks to nobody: it may run in a destructor.
        """
        self._holdings.drop(spec)

    def unload(self, spec: ModelSpec | None = None) -> None:
        """Drop the weights of `spec`, or all, in the workers and give their GPU memory back. The processes stay."""
        with self._lock:
            if self.alive and self.workers:
                self._conversation.drain(None)
                loaded = set(self._holdings.loaded)
                self._holdings.unload(({spec} & loaded) | self._holdings.unused if spec else loaded)

    def held(self, spec: ModelSpec, ranks: Sequence[int]) -> tuple[int, int]:
        """Bytes of a model's weights on the devices of `ranks`: now, and with all back that has stepped out.

        As the workers said last; asks nobody.
        """
        return self._holdings.held(spec, ranks)

    def step_out(self, spec: ModelSpec, ranks: Sequence[int], nbytes: float, poll: Poll | None = None) -> int:
        """Move weights to host memory until the devices of `ranks` have `nbytes` more each, or all of `spec`'s.

        They come back by themselves with the next forward. Returns the bytes that left all these devices.

        Args:
            poll: as in `forward`. Weights that are on their way leave all the same.

        Raises:
            PlacementError: host memory has no room for them.
        """
        with self._lock:
            if not self.alive or not self.workers or spec not in self._holdings.loaded:
                return 0
            return self._holdings.step_out(spec, ranks, nbytes, poll)

    def step_aside(self, spec: ModelSpec, poll: Poll | None = None) -> int:
        """Let every other model step out on all workers; returns the bytes that left the devices."""
        with self._lock:
            ranks = range(self.settings.plan.num_gpus)
            others = [other for other in self._holdings.loaded if other != spec]
            return sum(self.step_out(other, ranks, 2**62, poll) for other in others)

    def trim(self) -> None:
        """Let the workers give back what only a sampling run needs; weights stay. Starts nothing.

        Does nothing while a request that was given up is still at work, as its end does the same.
        """
        with self._lock:
            if self.workers and not self._conversation.lost() and not self._conversation.busy:
                self._conditioning.close()
                self._conversation.ask(Trim, None)

    def close(self) -> None:
        """End the processes. The next request starts new ones."""
        with self._lock:
            self._conversation.close()

    def status(self, poll: Poll | None = None) -> PoolStatus:
        """Memory, models and speed as they are now. Starts nothing. `poll` as in `forward`."""
        with self._lock:
            if not self.workers:
                return PoolStatus("not started", self.settings)
            if self._conversation.lost():
                return PoolStatus("ended", self.settings)
            self._conversation.drain(poll)
            replies, last = self._conversation.ask(Report, poll), self._last
            return PoolStatus(
                "ready",
                self.settings,
                self.launcher_pid,
                self.workers[0].torch,
                self.workers[0].xfuser,
                tuple(reply.outcome for reply in replies if isinstance(reply.outcome, WorkerStatus)),
                last.seconds,
                last.hop,
                last.exchanges,
                last.times,
                last.failed,
                self._planner.reason,
            )

    def survey(self, poll: Poll | None = None) -> tuple[Surveyed, ...]:
        """What the workers' devices do, measured the first time, and have room for, by rank. Starts the workers."""
        with self.session(poll):
            self._conversation.drain(poll)
            replies = self._conversation.ask(Survey, poll)
            return tuple(reply.outcome for reply in replies if isinstance(reply.outcome, Surveyed))

    # What a forward needs first.

    def _ensure_planned(self, kind: Kind, poll: Poll | None, make_room: Callable[[int], None] | None) -> None:
        """Let the workers run under the plan for this kind of forward."""
        plan = self._planner.recall(kind, self.settings.plan)
        if plan is None:
            self._make_room_for(kind.spec, make_room)  # before it is counted
            surveyed, loaded = self.survey(poll), bool(self._holdings.loaded)
            plan = self._planner.choose(_config_of(kind.spec), kind, surveyed, self.settings.plan, loaded)
        if plan != self.settings.plan:
            self._conversation.drain(poll)
            self._divide(plan)

    def _divide(self, plan: ParallelPlan) -> None:
        if not plan.holds_as(self.settings.plan):
            self._holdings.unload(set(self._holdings.loaded))
        try:
            self._conversation.ask(lambda number: Divide(number, plan), None)
        except PoolError:
            self.close()  # the workers may be of two minds
            raise
        self.settings = replace(self.settings, plan=plan)

    def _ensure_loaded(self, kind: Kind, poll: Poll | None, make_room: Callable[[int], None] | None) -> None:
        spec = kind.spec
        self._make_room_for(spec, make_room)
        if spec in self._holdings.loaded:
            return
        started = time.perf_counter()
        log.info("Loading %s on %d workers.", spec.name, self.settings.plan.num_gpus)
        self._holdings.make_way(poll)
        try:
            self._holdings.load(spec, kind.tokens, poll)
        except PlacementError as error:
            raise PlacementError(f"{error}{self._ways_out(kind, poll)}") from None
        log.info("%s is loaded after %.1f s.", spec.name, time.perf_counter() - started)

    def _ways_out(self, kind: Kind, poll: Poll | None) -> str:
        """Sizes that would fit, as a sentence; nothing where there are none, or no room to find out."""
        try:
            return self._planner.ways_out(_config_of(kind.spec), kind, self.survey(poll))
        except OutOfMemory:
            return ""

    def _make_room_for(self, spec: ModelSpec, make_room: Callable[[int], None] | None) -> None:
        """Have room made for what is to be loaded, or to come back from host memory."""
        if make_room is None or self.settings.device != "cuda":
            return
        if spec not in self._holdings.loaded:
            make_room(most_held(_config_of(spec), spec, self.settings.plan))
        elif (coming := self._holdings.coming_back(spec)) is not None:
            make_room(coming)


@functools.lru_cache(maxsize=16)
def _config_of(spec: ModelSpec) -> WanConfig:
    """Read once for each spec: its `stamp` changes with the file."""
    return model_config(spec.path, spec.module)
