"""Ranks that have the same part of a divided model share its blocks, and give what whole parts give, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testkit import tiny, worker_group
from testkit.shared.divided import UNEVEN, Case
from wan_parallel.distributed.approximate.schedule import FILL, STALE
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced

SHARED = [
    (plan, {"size": size, "batch": batch, "max_batch": 2}, mode)
    for plan, size, batch, mode in (
        (ParallelPlan(4, tensor_parallel=2), (3, 6, 10), 1, "exact"),
        (ParallelPlan(4, pipeline_parallel=2), (2, 7, 5), 3, "exact"),
        (ParallelPlan(4, tensor_parallel=2, data_parallel=2), (2, 7, 5), 3, "exact"),  # uneven work
        (ParallelPlan(4, pipeline_parallel=2, data_parallel=2), (2, 7, 5), 7, "exact"),  # 2 slices, and 3 with fewer
        (ParallelPlan(4, pipeline_parallel=2, data_parallel=2), (2, 7, 5), 1, "exact"),  # one group of all
        (ParallelPlan(4, pipeline_parallel=2, data_parallel=2), (2, 14, 6), 3, "pipefusion"),
    )
]
PLACES = [("off", "off"), ("on", "off"), ("on", "on")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> worker_group.Outcome:
    path = tiny.write_checkpoint(tmp_path_factory.mktemp("shared") / "uneven.safetensors", UNEVEN)
    return worker_group.run(4, shared_jobs(path), tmp_path_factory.mktemp("gloo"))


def shared_jobs(path: str) -> list[worker_group.Job]:
    """Each plan with its weights whole, shared, and shared in host memory."""
    jobs = []
    for plan, case, mode in SHARED:
        for shard, offload in PLACES:
            job = Case(plan, **case).job(path)
            spec = replace(job.spec, shard_weights=shard, offload=offload)
            for kind in (FILL, STALE) if mode == "pipefusion" else (None,):
                branch_ids = tuple(str(item) for item in range(case["batch"]))
                run = f"run {shard} {offload}"
                step = Displaced(kind, run, branch_ids, PatchSplit(), strategy=mode) if kind else None
                jobs.append(replace(job, spec=spec, displaced=step, pipeline_mode=mode))
    return jobs


def test_shared_weights_of_a_divided_model_give_the_same_bits(outcome):
    jobs = shared_jobs("")
    whole = {
        (job.plan, job.pipeline_mode, job.displaced and job.displaced.kind, job.given.x.shape): latent
        for job, latent in zip(jobs, outcome.latents, strict=True)
        if job.spec.shard_weights == "off"
    }
    for job, latent in zip(jobs, outcome.latents, strict=True):
        key = job.plan, job.pipeline_mode, job.displaced and job.displaced.kind, job.given.x.shape
        assert torch.equal(latent, whole[key]), job


def test_the_ranks_with_the_same_part_of_a_model_hold_a_share_of_it_each(outcome):
    jobs = shared_jobs("")
    for number in range(0, len(jobs) - 6, 3):
        whole, shared, hosted = (max(rank) for rank in outcome.held[number : number + 3])
        assert shared < 0.7 * whole and hosted < 0.5 * shared
