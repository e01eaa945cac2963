"""Runs requests on the workers of many plans in one group of gloo processes, without the start of a pool for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gloo_group
import pack  # noqa: F401 (registers wan_parallel, also in the processes of the group)
import tiny
import torch
from wan_parallel.distributed.arena import Arena, needed
from wan_parallel.distributed.gate import Gate, GateMemory
from wan_parallel.distributed.messages import Displaced, Forward, Load, ModelSpec, PoolSettings, Unload
from wan_parallel.distributed.plan import ParallelPlan
from wan_parallel.distributed.worker import Worker
from wan_parallel.wanvideo.model import grid_of, unpatchify


@dataclass(frozen=True)
class Job:
    """One forward under one plan."""

    plan: ParallelPlan
    spec: ModelSpec
    given: tiny.Inputs
    displaced: Displaced | None = None
    pipeline_mode: str = "exact"
    overlap: bool = True

    @property
    def settings(self) -> PoolSettings:
        return PoolSettings(self.plan, device="cpu", pipeline_mode=self.pipeline_mode, overlap=self.overlap)


@dataclass(frozen=True)
class Outcome:
    """What came out of the jobs: a latent for each, and the bytes of weights that each rank's device held for it."""

    latents: list[torch.Tensor]
    held: list[list[int]]


def run(world_size: int, jobs: Sequence[Job], folder: Path) -> Outcome:
    """Do all jobs, whose plans are for `world_size` ranks, one after the other."""
    gate, arena = GateMemory(), Arena(sum(_room(job) for job in jobs))
    requests = [_request(number, job, arena) for number, job in enumerate(jobs, 1)]
    work = [(job.settings, request) for job, request in zip(jobs, requests, strict=True)]
    results = gloo_group.run(world_size, _work, folder, gate.path, work)
    latents = []
    for job, request in zip(jobs, requests, strict=True):
        x = job.given.x
        latents.append(unpatchify(arena.view(request.out).clone(), grid_of(x), tuple(x.shape[-3:])))
    return Outcome(latents, [[int(rank["held"][i]) for rank in results] for i in range(len(jobs))])


def _room(job: Job) -> int:
    return needed(job.given) + job.given.x.numel() * 8 + 4096  # the output may be padded to whole tokens


def _request(number: int, job: Job, arena: Arena) -> Forward:
    x = job.given.x
    refs = [arena.write(tensor) for tensor in job.given]
    out = arena.allocate(torch.float32, (len(x), grid_of(x).tokens, x.shape[1] * 4))
    arena.view(out).fill_(float("nan"))  # each number must be written
    return Forward(number, job.spec, arena.ref, *refs, out, job.displaced)


def _work(rank: int, _world: int, gate: str, work: list[tuple[PoolSettings, Forward]]) -> gloo_group.Results:
    workers: dict[PoolSettings, Worker] = {}
    held = []
    for (settings, request), following in zip(work, [*work[1:], None], strict=True):
        if settings not in workers:
            workers[settings] = Worker(rank, settings, Gate(gate))
        worker = workers[settings]
        _handle(worker, Load(request.id, request.spec))
        held.append(worker.models.loaded[request.spec].device_bytes)
        _handle(worker, request)
        if following is None or following[0] != settings:  # a sampling run ends with its model
            _handle(worker, Unload(request.id, tuple(worker.models.loaded)))
    return {"held": torch.tensor(held)}


def _handle(worker: Worker, request: Load | Forward | Unload) -> None:
    reply = worker.handle(request)
    assert not reply.error, reply.error
