"""One process per GPU: joins the group, holds its part of the weights, answers requests one after the other.

A `Worker` hands each request to the room that it is for: forward.py runs forwards, models.py holds weights,
groups.py has the groups of ranks under the plan, vae_worker.py the VAE, worker_report.py tells how all of it is.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from ...wanvideo.base.user_error import UserError
from ...wanvideo.ops import pointwise
from ..comm import timing
from ..comm.probe import probe
from ..parallel.groups import ParallelGroups
from ..plan.degrees import ParallelPlan
from ..protocol.machine import Machine
from ..protocol.messages import Join, StartFailed, decode, encode
from ..protocol.pool_errors import Failure, OutOfMemory
from ..protocol.replies import Done, ForwardDone, GivenUp, Outcome, Reply
from ..protocol.reports import DeviceProfile
from ..protocol.requests import (
    AnyRequest,
    ApplyLora,
    DecodeVAE,
    EncodeVAE,
    Forward,
    Load,
    LoadVAE,
    Offload,
    Probe,
    Reconfigure,
    Report,
    Request,
    Trim,
    Unload,
)
from ..protocol.specs import ModelSpec, PoolSettings, RankLocation
from ..shm import signs
from ..shm.arena import ArenaReader
from ..shm.cancel import CancelBarrier, Cancelled
from ..shm.signs import Activity, Mark
from ..weights.device_memory import MemoryMeter
from ..weights.models import Models
from .forward import ForwardRunner
from .vae_worker import VAEs
from .worker_report import device_name, held_bytes, link, out_of_memory, ready, worker_status

log = logging.getLogger(__name__)

_ACTIVITIES: dict[type[Request[Any]], Activity] = {
    Load: Activity.LOADING,
    ApplyLora: Activity.MERGING,
    Forward: Activity.FORWARD,
    Unload: Activity.UNLOADING,
    Offload: Activity.OFFLOADING,
    Trim: Activity.TRIMMING,
    Report: Activity.REPORTING,
    Probe: Activity.PROBING,
    Reconfigure: Activity.REGROUPING,
    LoadVAE: Activity.LOADING_VAE,
    DecodeVAE: Activity.DECODING,
    EncodeVAE: Activity.ENCODING,
}


class Worker:
    """Executes requests; every method that the ranks run together makes the same collective calls on all.

    Args:
        locations: of all ranks, by rank.
        device: that of the rank's location without; benchmarks/benchlib/simulation.py has one that only counts.
    """

    def __init__(
        self,
        rank: int,
        settings: PoolSettings,
        barrier: CancelBarrier,
        locations: Sequence[RankLocation],
        device: torch.device | None = None,
    ):
        self.rank, self.locations = rank, locations
        self.device = device or device_at(settings, locations[rank])
        self.barrier = barrier
        self.parallel = ParallelGroups(rank, settings, self.device)
        self.memory = MemoryMeter(self.device)
        self.arena = ArenaReader()
        self._begin()
        self.fused = pointwise.use_triton(self.device)
        self.machine: Machine | None = None
        self._done: set[Hashable] = {None}  # kinds of requests that were answered before

    def handle(self, request: AnyRequest) -> Reply:
        """Answer one request; what it fails with becomes the outcome of the reply."""
        started = time.perf_counter()
        signs.begin(_ACTIVITIES[type(request)])
        first = (kind := _kind_of(request)) not in self._done
        with signs.marked(Mark.FIRST if first else Mark.NONE):
            outcome = self._outcome(request)
        if first and not isinstance(outcome, Failure | GivenUp):
            self._done.add(kind)
        seconds, held = time.perf_counter() - started, self.models.memory.held()
        return Reply(request.id, self.rank, outcome, seconds, held, self.vaes.keys)

    def _outcome(self, request: AnyRequest) -> Outcome:
        try:
            with torch.inference_mode():
                return self._do(request)
        except Cancelled:
            self.trim()  # the client will not wait to ask for it
            return GivenUp()
        except torch.OutOfMemoryError as error:
            if isinstance(request, Forward):
                self.models.learn(request.spec)
            return Failure.of(OutOfMemory(out_of_memory(self.device, error)))
        except UserError as error:
            return Failure.of(error)
        except Exception as error:  # the boundary of the process: whatever it is, the client must hear of it
            log.exception("A request failed.")
            return Failure.of(error)

    def _do(self, request: AnyRequest) -> Outcome:
        match request:
            case Load():
                self.models.load(request.spec, request.tokens, self.parallel.join)
            case ApplyLora():
                self.models.apply_lora(request, self.arena)
            case Forward():
                return self._measured(request)
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
            case Offload():
                self.models.offload(request)
            case Report():
                return worker_status(self)
            case Probe():
                return self.probe()
            case Reconfigure():
                self.reconfigure(request.plan)
        return Done()

    def _measured(self, request: Forward) -> ForwardDone:
        """Run a forward, and tell what it exchanged and where its time went."""
        self.memory.last = None
        with timing.measuring(self.device) as recorder:
            exchange = self.runner.run(request)
            done = ForwardDone(recorder.waits(), exchange)
        self.memory.end(*held_bytes(self))
        return done

    def unload(self, specs: Iterable[ModelSpec]) -> None:
        """Drop the weights of these models and give their memory back to the device."""
        self.runner.forget()
        self.models.drop(specs)
        self.memory.last = None  # it speaks of weights that are gone
        self.vaes.drop()
        if not self.models.loaded:
            self.runner.close()
        self.models.memory.release()

    def trim(self) -> None:
        """Give back what only a sampling run needs: displaced patches, keys and values of texts, the blocks in passing,
        what the exchanges write to, and torch's cache."""
        self.runner.trim()
        self.models.memory.forget_texts()
        self.parallel.close_peer_memories()
        self.models.memory.release()

    def probe(self) -> DeviceProfile:
        """What the machine does, measured the first time, and what there is room for (a collective call)."""
        if self.machine is None:
            self.machine = probe(self.device, self.parallel.plan.num_gpus)
            self.models.memory.release()
        return DeviceProfile(self.machine, *self.models.memory.rooms(), link(self), device_name(self.device))

    def reconfigure(self, plan: ParallelPlan) -> None:
        """Share the GPUs out as `plan` says (a collective call). Models that it divides otherwise are forgotten."""
        before, settings = self.parallel.plan, replace(self.parallel.settings, plan=plan)
        self.runner.strategies.close()  # what they keep is of the groups of ranks before
        self.parallel.set_plan(settings)
        if plan.holds_as(before):
            self.models.settings = settings
        else:
            self.unload(list(self.models.loaded))
            self.parallel.rebuild(self.models.process_groups())
            self._begin()
        for loaded in self.models.loaded.values():
            self.parallel.join(loaded.source.config.num_heads)

    def _begin(self) -> None:
        """Begin with no models under the plan at hand: all who use them get the same ones."""
        mine = self.parallel
        self.models = Models(self.rank, mine.settings, self.device, mine.shard, mine.stage)
        self.runner = ForwardRunner(mine, self.models, self.barrier, self.arena, self.memory)
        self.vaes = VAEs(self.rank, mine.settings, self.device, self.barrier, self.models)


def main(join: bytes, connection: Connection) -> None:
    """Entry of a worker process: join the others, say so, serve until the launcher closes the connection.

    Args:
        join: a `messages.Join`, encoded.
        connection: to the launcher.
    """
    told = decode(join)
    assert isinstance(told, Join)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"[WanParallel rank {told.rank}] %(message)s", force=True
    )
    try:
        signs.show_in(told.signs, told.rank)
        signs.begin(Activity.JOINING)
        join_world(told.rank, told.settings, told.locations, told.rendezvous)
        signs.begin(Activity.STARTING)
        worker = Worker(told.rank, told.settings, CancelBarrier(told.barrier), told.locations)
    except Exception as error:  # the boundary of the process, as in Worker.handle
        log.exception("The start failed.")
        connection.send_bytes(encode(StartFailed(told.rank, Failure.of(error))))
        return
    connection.send_bytes(encode(ready(worker)))
    while True:
        signs.begin(Activity.IDLE)
        try:
            request = decode(connection.recv_bytes())
        except EOFError:
            return
        assert isinstance(request, Request)
        connection.send_bytes(encode(worker.handle(request)))


def _kind_of(request: AnyRequest) -> Hashable:
    """What a worker may build kernels and connections for when it does so for the first time; None where nothing."""
    match request:
        case Forward():
            return Forward, request.spec, request.strategy, request.x.shape
        case DecodeVAE():
            return DecodeVAE, request.key, request.latent.shape
        case EncodeVAE():
            return EncodeVAE, request.key, request.frames.shape
        case Probe() | Reconfigure():
            return type(request).__name__
    return None


def device_at(settings: PoolSettings, location: RankLocation) -> torch.device:
    """The device of a rank that lives at `location`."""
    return torch.device("cuda", location.device) if settings.device == "cuda" else torch.device("cpu")


def join_world(rank: int, settings: PoolSettings, locations: Sequence[RankLocation], rendezvous: str) -> None:
    """Join the default process group of all workers, and settle on this rank's device.

    Args:
        locations: of all ranks, by rank.
        rendezvous: as in `messages.Join`.
    """
    world_size, location = len(locations), locations[rank]
    device, device_id = device_at(settings, location), None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(settings.memory_fraction)
        device_id = device
    else:
        neighbours = sum(other.host == location.host for other in locations)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            device_id=device_id,
        )
