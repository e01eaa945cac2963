"""The client's handle on a pool of workers, and the only room of it that others enter.

A `Pool` gives one thread at a time the turn, has the workers brought to where a forward needs them (preparation.py),
and runs it (forward_call.py). How it talks to them is in rpc.py, what they hold in loaded_models.py, which plan they
run under in planner.py, where they live in the executor, and what requests fail with in failures.py.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

import torch

from ...wanvideo.base.attention_choice import PLAIN_ATTENTION, AttentionChoice
from ...wanvideo.base.conditioning import NOTHING, Conditioning
from ..comm.timing import RankTimes, rank_times
from ..executors.executor import Executor
from ..executors.local import LocalExecutor
from ..planner.planner import Planner, Workload, resolved
from ..protocol.replies import ForwardDone
from ..protocol.reports import DeviceProfile, Exchange, WorkerStatus
from ..protocol.requests import Displaced, Report, Request, Trim
from ..protocol.silence import SilenceLimits
from ..protocol.specs import ModelSpec, PoolSettings, RankLocation
from ..shm.arena import Arena, ReusedArena
from ..weights.lora_transfer import NO_LORAS, LoraSet
from .attention_count import AttentionCount, AttentionCounter
from .forward_call import ForwardInputs, sent_dtype
from .loaded_models import LoadedModels
from .preparation import MakeRoom, Preparation, config_of, workload_of
from .rpc import Answers, Poll, SilenceNote, Turn, WorkerClient, within
from .shared_conditioning import SharedConditioning


@dataclass(frozen=True)
class PoolStatus:
    """What a status shows.

    Args:
        state: "not started", "ready" or "ended".
        times: where the seconds of the last forward went, by rank. Empty, and the seconds 0, where there was none yet,
            or where the last one failed or was given up; `failed` tells which.
        plan_reason: why the plan was chosen; "" where it was set.
        attention: how the last forwards computed self-attention; None where they left it to their models.
    """

    state: str
    settings: PoolSettings
    _: KW_ONLY
    launcher_pid: int = 0
    torch: str = ""
    xfuser: str = ""
    workers: tuple[WorkerStatus, ...] = ()
    last_forward_seconds: float = 0.0
    last_hop_seconds: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    times: tuple[RankTimes, ...] = ()
    failed: bool = False
    plan_reason: str = ""
    attention: AttentionCount | None = None


def acquire(settings: PoolSettings) -> Pool:
    """The pool of these settings; nothing is started until it is used.

    A pool lives as long as somebody holds it. The one asked for last is held here too, so that it outlives a
    graph that is built anew for each prompt. Settings that mean the same on this machine are one pool.

    Raises:
        PlanError: the plan cannot work.
    """
    global _recent
    executor = LocalExecutor()
    on_machine = executor.resolve(settings)
    Planner(on_machine).first_plan.validate()
    settings = resolved(on_machine)
    with _registry_lock:
        pool = _pools.get(settings)
        if pool is None:
            pool = _pools[settings] = Pool(settings, executor)
        before, _recent = _recent, pool
    del before  # which may be the last hold on a pool, whose end takes a while: without the lock
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
class LastForward:
    """What the last forward measured; nothing where there was none yet, or where it failed or was given up.

    Args:
        seconds: that the slowest worker took.
        hop: seconds for the way to the workers and back.
        exchanges: what was exchanged with other patches, by rank; empty unless stale keys and values were used.
        times: where the seconds went, by rank.
        failed: whether it failed, was given up, or is not done yet.
    """

    seconds: float = 0.0
    hop: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    times: tuple[RankTimes, ...] = ()
    failed: bool = False

    def begin(self) -> None:
        """Another forward begins, which has failed until it is done."""
        self.forget()
        self.failed = True

    def forget(self) -> None:
        """Forget what the forward measured; not whether it failed."""
        self.seconds = self.hop = 0.0
        self.exchanges, self.times = (), ()

    def end(self, answers: Answers[ForwardDone], whole: float) -> None:
        """The forward is done, and took `whole` seconds with the way to the workers and back."""
        self.seconds, self.failed = max(answers.seconds), False
        self.hop = whole - self.seconds
        self.exchanges = tuple(done.exchange for done in answers.outcomes if done.exchange is not None)
        self.times = rank_times(answers.seconds, [done.waits for done in answers.outcomes])


class Pool:
    """Workers that run DiT forwards together. Use `acquire` to get one.

    Every method starts what it needs. One request runs at a time; other threads wait their turn, in which `poll` is
    called as it is while the workers are at work. Nobody has the turn while ComfyUI or another pool is called.

    No wait is for ever: a request whose workers show no sign of life ends with the pool (see protocol/silence.py), and
    what only puts things in order waits for its turn for `SilenceLimits.limit` seconds at most (`WorkersBusy`).

    Attributes:
        models: what the workers have loaded. Its `keep`, `drop`, `held` and `vaes` need no turn.
        last: what the last forward measured.
        make_arena: makes memory for the tensors of requests (see `Executor.make_arena`).
        silence: what is to be said of processes that show no sign of life; any thread may read it.
    """

    def __init__(self, settings: PoolSettings, executor: Executor | None = None):
        self._executor = executor or LocalExecutor()
        settings = resolved(self._executor.resolve(settings))
        self.make_arena = self._executor.make_arena
        self._turn = Turn()
        self._patience = SilenceLimits.from_environment(os.environ).limit
        self._client = WorkerClient(self._executor)
        self.silence: SilenceNote = self._client.silence
        self._arena = ReusedArena(self.make_arena)
        self._conditioning = SharedConditioning(self.make_arena)
        self.models = LoadedModels(self._client, self._arena)
        self._preparation = Preparation(settings, self._client, self.models)
        self.last, self._attention = LastForward(), AttentionCounter()
        self._client.at_reply = (self.models.hear,)
        self._client.at_end = (
            *(self.models.forget, self.last.forget, self._attention.forget),
            *(self._arena.close, self._conditioning.close),
        )
        # nothing of the client holds this pool; at the end of the process see `WorkerClient.leave`
        weakref.finalize(self, self._client.close).atexit = False

    @property
    def settings(self) -> PoolSettings:
        """The settings, with the plan under which the workers run now."""
        return self._preparation.settings

    @property
    def locations(self) -> tuple[RankLocation, ...]:
        """Where the workers live, by rank, whether they have been started or not."""
        return self._executor.locations(self.settings)

    @property
    def alive(self) -> bool:
        """Whether the processes have been started and none has been seen to end."""
        return self._client.alive

    @property
    def launcher_pid(self) -> int:
        """A process id that tells one start of the workers from another: the launcher's; 0 while there is none."""
        return self._client.pid

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers, by rank; empty until they have said hello."""
        return tuple(worker.pid for worker in self._client.workers)

    def check(self, spec: ModelSpec) -> None:
        """Check that the model can be divided as was asked for, as `forward` does. Starts nothing.

        Raises:
            CheckpointError, PlanError: it cannot.
        """
        self._preparation.check(Workload(spec, 0, 1))

    def ensure_ready(
        self,
        spec: ModelSpec,
        poll: Poll | None = None,
        make_room: MakeRoom | None = None,
        tokens: int = 0,
        items: int = 1,
        attention: AttentionChoice = PLAIN_ATTENTION,
    ) -> None:
        """Start the workers and load a model, as `forward` does by itself. Arguments and errors as there.

        `tokens` is the length of the video to come, beside which the weights must fit; 0 is 81 frames at 480p.
        `items` is how many there are in a forward, which an automatic plan depends on.
        """
        workload = workload_of(spec, tokens, items, attention)
        self._preparation.check(workload)
        with self._ready(workload, poll, make_room):
            pass

    def forward(
        self,
        spec: ModelSpec,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        loras: LoraSet | None = None,
        poll: Poll | None = None,
        make_room: MakeRoom | None = None,
        displaced: Displaced | None = None,
        conditioning: Conditioning = NOTHING,
        attention: AttentionChoice = PLAIN_ATTENTION,
    ) -> torch.Tensor:
        """One DiT forward on all workers (see `WanModel.forward`).

        Args:
            spec: the model; it is loaded where the workers don't have it.
            x: latent [B, in_dim, T, H, W], any float dtype and device.
            timestep: sigma * 1000, [B] or [B, T].
            context: [B, L, text_dim].
            loras: LoRA changes; merged where the workers' are others.
            poll: called at least every 0.1 s while waiting. What it raises is passed on, the workers drop the
                request, and the pool stays usable.
            make_room: called with the bytes that each GPU will need, before a model is loaded on GPUs.
            displaced: the forward's part in displaced patch parallelism (see schedule.py); exact without.
            conditioning: further inputs of some variants, each with B items.
            attention: sparse self-attention, or another dense kernel than the model's own.

        Returns:
            float32 [B, out_dim, T, H, W] on the device of x.

        Raises:
            WorkerDied: a process ended; the next call starts a new pool.
            PoolError: the workers failed.
            UserError: the model cannot run like this (CheckpointError, AttentionError, PlanError, PlacementError, ...).
            ValueError: an input has the wrong shape.
        """
        self._preparation.check(Workload(spec, 0, len(x)))
        inputs = ForwardInputs.checked(config_of(spec), x, timestep, context, conditioning)
        workload = workload_of(spec, inputs.tokens, len(x), attention, displaced)
        self._preparation.check(workload)
        with self._ready(workload, poll, make_room, self.last.begin):
            self.models.apply_lora(spec, loras or NO_LORAS, poll)
            started = time.perf_counter()
            self._client.wait_for_abandoned(poll)
            self._client.reset_after_abort(poll)
            sent = inputs.write(self._arena, self._conditioning, sent_dtype(spec), self.settings.device == "cuda")
            answers = self._client.ask(sent.request(spec, displaced, attention), poll)
            self.models.came_back(spec)
            result = sent.result()
            self.last.end(answers, time.perf_counter() - started)
            self._attention.count(attention, answers.outcomes[0].attention)
            return result

    @contextmanager
    def session(self, poll: Poll | None = None) -> Iterator[None]:
        """Start the workers, and let no other thread's request come between those that are made inside."""
        with self._turn.taken(poll):
            self._client.start(self.settings, poll)
            yield

    def ask(
        self, request: Callable[[int], Request[object]], arenas: tuple[Arena, ...] = (), poll: Poll | None = None
    ) -> float:
        """Let the workers answer what `request` makes of an id; returns the seconds of the slowest.

        Args:
            arenas: what they read and write meanwhile; closed once they no longer do. Views of them stay.
            poll: as in `forward`, as are the errors.
        """
        with self.session(poll):
            self._client.wait_for_abandoned(poll)
            self._client.lend(arenas)
            answers = self._client.ask(request, poll)
            self._client.lend(())
            return max(answers.seconds)

    def unload(self, spec: ModelSpec | None = None, poll: Poll | None = None) -> None:
        """Drop the weights of `spec`, or all, in the workers and give their GPU memory back. The processes stay.

        `poll` as in `forward`.
        """
        with self._turn.taken(within(self._patience, poll, "Unloading a model")):
            if self.alive and self._client.workers:
                self._client.wait_for_abandoned(poll)
                loaded = self.models.specs
                self.models.unload(({spec} & loaded) | self.models.unused if spec else loaded, poll)

    def offload(self, spec: ModelSpec, ranks: Sequence[int], nbytes: float, poll: Poll | None = None) -> int:
        """Move weights to host memory until the devices of `ranks` have `nbytes` more each, or all of `spec`'s.

        They come back by themselves with the next forward. Returns the bytes that left all these devices.

        Args:
            poll: as in `forward`. Weights that are on their way leave all the same.

        Raises:
            PlacementError: host memory has no room for them.
        """
        with self._turn.taken(within(self._patience, poll, "Moving weights to host memory")):
            if not self.alive or not self._client.workers or not self.models.has(spec):
                return 0
            return self.models.offload(spec, ranks, nbytes, poll)

    def offload_others(self, spec: ModelSpec, poll: Poll | None = None) -> int:
        """Offload every other model on all workers; returns the bytes that left the devices."""
        with self._turn.taken(within(self._patience, poll, "Moving weights to host memory")):
            ranks = range(self.settings.plan.num_gpus)
            others = [other for other in self.models.specs if other != spec]
            return sum(self.offload(other, ranks, 2**62, poll) for other in others)

    def trim(self, poll: Poll | None = None) -> None:
        """Let the workers give back what only a sampling run needs; weights stay. Starts nothing.

        Does nothing while a request that was given up is still at work, as its end does the same. `poll` as in
        `forward`.
        """
        with self._turn.taken(within(self._patience, poll, "Giving memory back")):
            if self._client.workers and not self._client.lost() and not self._client.busy:
                self._conditioning.close()
                self._client.ask(Trim, poll)

    def close(self, poll: Poll | None = None) -> None:
        """End the processes. The next request starts new ones. `poll` as in `forward`."""
        with self._turn.taken(within(self._patience, poll, "Ending the workers")):
            self._client.close()

    def status(self, poll: Poll | None = None) -> PoolStatus:
        """Memory, models and speed as they are now. Starts nothing. `poll` as in `forward`."""
        with self._turn.taken(within(self._patience, poll, "The status")):
            if not self._client.workers:
                return PoolStatus("not started", self.settings)
            if self._client.lost():
                return PoolStatus("ended", self.settings)
            self._client.wait_for_abandoned(poll)
            workers, first, last = self._client.ask(Report, poll).outcomes, self._client.workers[0], self.last
            return PoolStatus(
                "ready",
                self.settings,
                launcher_pid=self.launcher_pid,
                torch=first.torch,
                xfuser=first.xfuser,
                workers=workers,
                last_forward_seconds=last.seconds,
                last_hop_seconds=last.hop,
                exchanges=last.exchanges,
                times=last.times,
                failed=last.failed,
                plan_reason=self._preparation.planner.reason,
                attention=self._attention.count_now,
            )

    def probe(self, poll: Poll | None = None) -> tuple[DeviceProfile, ...]:
        """What the workers' devices do, measured the first time, and have room for, by rank. Starts the workers."""
        with self.session(poll):
            return self._preparation.probe(poll)

    @contextmanager
    def _ready(
        self,
        workload: Workload,
        poll: Poll | None,
        make_room: MakeRoom | None,
        begin: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Have the turn, with the workers ready for forwards of this workload.

        Args:
            make_room: called without the turn.
            begin: called first, with the turn.
        """
        made: set[int] = set()
        while True:
            with self._turn.taken(poll):
                begin()
                room = self._preparation.advance(workload, poll, made if make_room is not None else None)
                if room is None:
                    yield
                    return
            assert make_room is not None  # else nobody asks for room
            make_room(room)
            made.add(room)
