"""Runs requests on the workers of many plans in one group of gloo processes, without the start of a pool for each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from wan_parallel.distributed.client.shared_conditioning import SharedConditioning
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.messages import decode, encode
from wan_parallel.distributed.protocol.replies import Reply
from wan_parallel.distributed.protocol.requests import Displaced, Forward, Load, Request, Unload
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings, on_one_host
from wan_parallel.distributed.shm.arena import Arena, needed
from wan_parallel.distributed.shm.cancel import CancelBarrier, CancelMemory
from wan_parallel.distributed.worker.worker import Worker
from wan_parallel.wanvideo.base.attention_choice import PLAIN_ATTENTION, AttentionChoice
from wan_parallel.wanvideo.base.conditioning import NOTHING, Conditioning
from wan_parallel.wanvideo.base.grid import grid_of, unpatchify
from wan_parallel.wanvideo.checkpoint.weight_source import model_config

import testkit  # noqa: F401 (registers wan_parallel, also in the processes of the group)
from testkit import gloo_group, tiny


@dataclass(frozen=True)
class Slow:
    """A rank that sleeps for so many seconds before each of its blocks."""

    rank: int = -1
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """One forward under one plan."""

    plan: ParallelPlan
    spec: ModelSpec
    given: tiny.Inputs
    displaced: Displaced | None = None
    pipeline_mode: str = "exact"
    overlap: bool = True
    slow: Slow = Slow()
    conditioning: Conditioning = NOTHING
    attention: AttentionChoice = PLAIN_ATTENTION

    @property
    def settings(self) -> PoolSettings:
        return PoolSettings(self.plan, device="cpu", pipeline_mode=self.pipeline_mode, overlap=self.overlap)


@dataclass(frozen=True)
class Outcome:
    """What came out of the jobs: a latent for each, the bytes of weights that each rank held for it, and what each rank
    replied."""

    latents: list[torch.Tensor]
    held: list[list[int]]
    replies: list[list[Reply]]


def run(world_size: int, jobs: Sequence[Job], folder: Path) -> Outcome:
    """Do all jobs, whose plans are for `world_size` ranks, one after the other."""
    barrier, arena = CancelMemory(world_size), Arena(sum(room(job) for job in jobs))
    shared = [SharedConditioning() for _ in jobs]
    requests = [request(i, job, arena, further) for i, (job, further) in enumerate(zip(jobs, shared, strict=True), 1)]
    work = [(job.settings, forward, job.slow) for job, forward in zip(jobs, requests, strict=True)]
    results = gloo_group.run(world_size, _work, folder, barrier.path, work)
    latents = []
    for job, forward in zip(jobs, requests, strict=True):
        x = job.given.x
        latents.append(unpatchify(arena.view(forward.out).clone(), grid_of(x), tuple(x.shape[-3:])))
    held = [[int(rank["held"][i]) for rank in results] for i in range(len(jobs))]
    replies = [[decode(rank[f"reply {i}"].numpy().tobytes()) for rank in results] for i in range(len(jobs))]
    return Outcome(latents, held, replies)


def room(job: Job) -> int:
    """Bytes of an arena in which the inputs and the output of a job lie."""
    return needed(job.given) + job.given.x.numel() * 8 + 4096  # the output may be padded to whole tokens


def request(number: int, job: Job, arena: Arena, further: SharedConditioning | None = None) -> Forward:
    """The request of a job, whose inputs are written into `arena` and whose further ones into `further`."""
    x, further = job.given.x, further or SharedConditioning()
    refs = [arena.write(tensor) for tensor in job.given]
    channels = model_config(job.spec.path, job.spec.module).out_dim
    out = arena.allocate(torch.float32, (len(x), grid_of(x).tokens, channels * 4))
    arena.view(out).fill_(float("nan"))  # each number must be written
    conditioning = further.share(job.conditioning, torch.float32)
    return Forward(number, job.spec, arena.ref, *refs, out, job.displaced, conditioning, job.attention)


def _work(
    rank: int, world_size: int, barrier: str, work: list[tuple[PoolSettings, Forward, Slow]]
) -> gloo_group.Results:
    workers: dict[PoolSettings, Worker] = {}
    held, replies = [], {}
    for (settings, request, slow), following in zip(work, [*work[1:], None], strict=True):
        if settings not in workers:
            workers[settings] = Worker(rank, settings, CancelBarrier(barrier), on_one_host(world_size))
        worker = workers[settings]
        handle(worker, Load(request.id, request.spec))
        model = worker.models.loaded[request.spec].model
        held.append(worker.models.loaded[request.spec].device_bytes)
        hooks = [
            block.register_forward_pre_hook(lambda *_inputs, seconds=slow.seconds: time.sleep(seconds))
            for block in model.blocks
            if rank == slow.rank
        ]
        reply = encode(handle(worker, request))
        replies[f"reply {len(held) - 1}"] = torch.frombuffer(bytearray(reply), dtype=torch.uint8)
        for hook in hooks:
            hook.remove()
        if following is None or following[0] != settings:  # a sampling run ends with its model
            handle(worker, Unload(request.id, tuple(worker.models.loaded)))
    return {"held": torch.tensor(held), **replies}


def handle(worker: Worker, request: Request) -> Reply:
    """Let a worker answer a request, which must not fail."""
    reply = worker.handle(request)
    assert reply.failure is None, reply.failure
    return reply
