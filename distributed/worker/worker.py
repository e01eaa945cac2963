"""One process per GPU: joins the group, holds its part of the weights, answers requests one after the other.

A `Worker` hands each request to the room that it is for: forward.py runs forwards, models.py holds weights,
groups.py has the groups of ranks under the plan, vae_worker.py the VAE, worker_report.py tells how all of it is.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from ...wanvideo.attention.kernels import AttentionError
from ...wanvideo.base.lora import PatchError
from ...wanvideo.base.tensor_info import CheckpointError
from ...wanvideo.ops import pointwise
from ...wanvideo.quant.fp8 import Fp8Error
from ...wanvideo.vae.vae_ops import VAEError
from ..approximate.displaced import StaleError
from ..comm import timing
from ..comm.probe import survey
from ..parallel.groups import Membership
from ..parallel.sequence import MissingPackage
from ..parallel.xfuser_backend import BackendError
from ..plan.degrees import ParallelPlan, PlanError
from ..plan.placement import PlacementError
from ..protocol.machine import Machine
from ..protocol.messages import Reply, Start, decode, encode
from ..protocol.reports import Surveyed
from ..protocol.requests import (
    DecodeVAE,
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
from ..protocol.specs import ModelSpec, PoolSettings
from ..shm.arena import ArenaReader
from ..shm.cancel import Cancelled, Gate
from ..shm.pinned import HostMemoryError
from ..weights.device_memory import MemoryMeter
from ..weights.models import AnotherRankRefused, Models
from .forward import ForwardRunner
from .vae_worker import VAEs
from .worker_report import device_name, held_bytes, link, out_of_memory, ready, worker_status

log = logging.getLogger(__name__)

_FOR_THE_USER = (
    AnotherRankRefused,
    AttentionError,
    BackendError,
    CheckpointError,
    Fp8Error,
    HostMemoryError,
    MissingPackage,
    PatchError,
    PlacementError,
    PlanError,
    StaleError,
    VAEError,
)
"""Errors whose text says what is wrong and what to do; others are told with their traceback in the console."""


class Worker:
    """Executes requests; every method that the ranks run together makes the same collective calls on all.

    Args:
        device: that of `settings` without; benchmarks/benchlib/simulation.py has one that only counts.
    """

    def __init__(self, rank: int, settings: PoolSettings, gate: Gate, device: torch.device | None = None):
        self.rank = rank
        self.device = device or (torch.device("cuda", rank) if settings.device == "cuda" else torch.device("cpu"))
        self.membership = Membership(rank, settings, self.device)
        self.models = self._no_models()
        self.memory = MemoryMeter(self.device)
        self.arena = ArenaReader()
        self.runner = ForwardRunner(self.membership, self.models, gate, self.arena, self.memory)
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
                        self.models.load(request.spec, request.tokens, self.membership.join)
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
                        self.models.offload(request)
                    case Report():
                        reply = replace(reply, status=worker_status(self))
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
            reply = replace(reply, kind="OutOfMemory", error=out_of_memory(self.device, error))
        except _FOR_THE_USER as error:
            reply = replace(reply, kind=type(error).__name__, error=str(error))
        except Exception as error:  # the boundary of the process: whatever it is, the client must hear of it
            log.exception("A request failed.")
            reply = replace(reply, kind=type(error).__name__, error=str(error) or type(error).__name__)
        seconds, held = time.perf_counter() - started, self.models.memory.held()
        return replace(reply, seconds=seconds, weights=held, vaes=self.vaes.keys)

    def _measured(self, request: Forward, reply: Reply) -> Reply:
        """Run a forward; the reply with what it exchanged and where its time went."""
        self.memory.last = None
        with timing.measuring(self.device) as watch:
            reply = replace(reply, exchange=self.runner.run(request), stalls=watch.stalls())
        self.memory.end(*held_bytes(self))
        return reply

    def unload(self, specs: Iterable[ModelSpec]) -> None:
        """Drop the weights of these models and give their memory back to the device."""
        self.runner.forget()
        self.models.drop(specs)
        self.memory.last = None  # it speaks of weights that are gone
        self.vaes.drop()
        if not self.models.loaded:
            self.runner.patches.close()
        self.models.memory.release()

    def trim(self) -> None:
        """Give back what only a sampling run needs: displaced patches, keys and values of texts, the blocks in passing,
        what the exchanges write to, and torch's cache."""
        self.runner.trim()
        self.models.memory.forget_texts()
        self.membership.close_mailboxes()
        self.models.memory.release()

    def survey(self) -> Surveyed:
        """What the machine does, measured the first time, and what there is room for (a collective call)."""
        if self.machine is None:
            self.machine = survey(self.device, self.membership.plan.num_gpus)
            self.models.memory.release()
        return Surveyed(self.machine, *self.models.memory.rooms(), link(self), device_name(self.device))

    def divide(self, plan: ParallelPlan) -> None:
        """Share the GPUs out as `plan` says (a collective call). Models that it divides otherwise are forgotten."""
        before, settings = self.membership.plan, replace(self.membership.settings, plan=plan)
        self.membership.follow(settings)
        if plan.holds_as(before):
            self.models.settings = settings
        else:
            self.unload(list(self.models.loaded))
            self.membership.rejoin(self.models.process_groups())
            self.models = self.runner.models = self.vaes.models = self._no_models()
        for loaded in self.models.loaded.values():
            self.membership.join(loaded.source.config.num_heads)

    def _no_models(self) -> Models:
        mine = self.membership
        return Models(self.rank, mine.settings, self.device, mine.shard, mine.stage)


def main(rank: int, start: bytes, connection: Connection, store: str, gate: str) -> None:
    """Entry of a worker process: join, say so, serve until the launcher closes the connection."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"[WanParallel rank {rank}] %(message)s", force=True
    )
    message = decode(start)
    assert isinstance(message, Start)
    settings = message.settings
    try:
        join_world(rank, settings, store)
        worker = Worker(rank, settings, Gate(gate))
    except Exception as error:  # the boundary of the process, as in Worker.handle
        log.exception("The start failed.")
        connection.send_bytes(encode(Reply(0, rank, kind=type(error).__name__, error=str(error))))
        return
    connection.send_bytes(encode(ready(worker)))
    while True:
        try:
            request = decode(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(encode(worker.handle(request)))


def join_world(rank: int, settings: PoolSettings, store: str) -> None:
    """Join the default process group of all workers, through the file `store`, and settle on this rank's device."""
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
