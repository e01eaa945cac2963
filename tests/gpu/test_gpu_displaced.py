"""Displaced patches on real GPUs, over NCCL: exact where they have to be, the reference's where they are stale."""

from __future__ import annotations

import gc
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
from testkit import tiny
from testkit.patch_runs import Reference, assert_like_the_reference, sample, through
from testkit.tiny import relative_error
from wan_parallel.distributed.approximate.kv_buffers import INSTALL_LINE, manager_name, official_version
from wan_parallel.distributed.approximate.schedule import STALE, PatchSettings, Schedule
from wan_parallel.distributed.client.failures import WorkerDied
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import SPLIT_MODES, ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.model.model import WanModel

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

FOUR_HEADS = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=3)
SIZE = (5, 14, 10)  # latent frames, rows, columns: 5 x 7 x 5 tokens
LARGE = (9, 60, 104)  # several milliseconds a layer for the 1.3B
STEPS = 8
DEFAULT = PatchSettings(PatchSplit("spatial", 32, 0), warmup_steps=2, sync_frequency=4, manager="native")
HERE = {"size": SIZE, "config": FOUR_HEADS, "device": DEVICE}


@dataclass(frozen=True)
class Shared:
    """A pool of workers."""

    gpus: int
    data: int = 1

    def __str__(self) -> str:
        return f"{self.gpus}-gpus" + (f"-data{self.data}" if self.data > 1 else "")


EVERY = pytest.mark.parametrize("shared", [Shared(2), Shared(4)], indirect=True, ids=str)
TWO = pytest.mark.parametrize("shared", [Shared(2)], indirect=True, ids=str)
FOUR = pytest.mark.parametrize("shared", [Shared(4)], indirect=True, ids=str)
official = pytest.mark.skipif(not official_version(), reason=f"distrifuser is missing: {INSTALL_LINE}")
MANAGERS = pytest.mark.parametrize("manager", ["host", "native", pytest.param("official", marks=official)])


@pytest.fixture(scope="module")
def shared(request):
    """A pool; tests that use the same one run one after the other."""
    pool = acquire(PoolSettings(ParallelPlan(request.param.gpus, request.param.data), DEVICE))
    yield pool
    pool.close()
    gc.collect()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("displaced") / "4-heads.safetensors", FOUR_HEADS)


@pytest.fixture(scope="module")
def one_gpu(path):
    return WanModel.from_checkpoint(path, torch.float32, torch.float32, DEVICE)


def spec(path, dtype="fp32", **options):
    return ModelSpec(path, weight_dtype=dtype, compute_dtype=dtype, **options)


# Against the reference.


@MANAGERS
@pytest.mark.parametrize("overlap", [0, 16])
@pytest.mark.parametrize("mode", SPLIT_MODES)
@EVERY
def test_a_run_is_that_of_the_reference(shared, path, one_gpu, mode, overlap, manager):
    settings = replace(DEFAULT, split=PatchSplit(mode, 32, overlap), manager=manager)
    assert_like_the_reference(shared, spec(path), one_gpu, settings, **HERE)
    assert {exchange.manager for exchange in shared.status().exchanges} <= {manager_name(manager, torch.device(DEVICE))}


@MANAGERS
@EVERY
def test_fp8_buffers_are_those_of_the_reference(shared, path, one_gpu, manager):
    settings = replace(DEFAULT, split=PatchSplit("spatial", 32, 16), fp8_buffers=True, manager=manager)
    # A key that is a rounding error away may lie on the other side of a step of fp8.
    assert_like_the_reference(shared, spec(path), one_gpu, settings, limit=1e-4, **HERE)


@pytest.mark.parametrize("fp8", [False, True])
@EVERY
def test_bf16_is_as_close_to_the_reference_as_on_one_gpu(shared, path, one_gpu, fp8):
    settings = replace(DEFAULT, split=PatchSplit("spatiotemporal", 32, 16), fp8_buffers=fp8)
    ranks, rough = shared.settings.plan.num_gpus, WanModel.from_checkpoint(path, torch.bfloat16, torch.bfloat16, DEVICE)
    with torch.inference_mode():
        expected = sample(Reference(one_gpu, ranks, 16), settings, **HERE).last
        alone = relative_error(sample(Reference(rough, ranks, 16), settings, **HERE).last, expected)
    error = relative_error(sample(through(shared, spec(path, "bf16")), settings, **HERE).last, expected)
    print(f"error {error:.2e}, one GPU {alone:.2e}")
    assert error <= 1.25 * alone


# As on the exact path.


@MANAGERS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", SPLIT_MODES)
@EVERY
def test_without_stale_steps_every_bit_is_that_of_the_exact_path(shared, path, mode, dtype, manager):
    forward = through(shared, spec(path, dtype))
    exact = sample(forward, None, **HERE).last
    settings = replace(DEFAULT, split=PatchSplit(mode, 32, 16), manager=manager)
    assert torch.equal(sample(forward, replace(settings, sync_frequency=1), **HERE).last, exact)
    warm_up = sample(forward, replace(settings, warmup_steps=STEPS, sync_frequency=10), **HERE)
    assert warm_up.kinds == "eeeeeeef" and torch.equal(warm_up.last, exact)


@TWO
@pytest.mark.parametrize("mode, size, overlap", [("spatial", (3, 8, 10), 32), ("temporal", (2, 8, 10), 16)])
def test_an_overlap_over_everything_is_the_exact_path(shared, path, mode, size, overlap):
    forward, here = through(shared, spec(path)), {**HERE, "size": size}
    displaced = sample(forward, replace(DEFAULT, split=PatchSplit(mode, 32, overlap)), **here)
    assert "s" in displaced.kinds
    assert relative_error(displaced.last, sample(forward, None, **here).last) <= 1e-5


@pytest.mark.parametrize("shared", [Shared(2), Shared(4), Shared(4, 2)], indirect=True, ids=str)
def test_branches_of_one_forward_share_nothing(shared, path, one_gpu):
    ranks = shared.settings.plan.sequence_ranks
    both = sample(through(shared, spec(path)), DEFAULT, batch=2, **HERE).last
    for i in range(2):
        with torch.inference_mode():
            alone = sample(Reference(one_gpu, ranks), DEFAULT, batch=2, items=slice(i, i + 1), **HERE).last
        assert relative_error(both[i : i + 1], alone) <= 1e-5


# Where the exchange has work to hide behind: what is read too early or written too late shows as another result.


@pytest.mark.parametrize("fp8", [False, True])
@EVERY
def test_a_large_run_comes_out_the_same_each_time_and_with_both_managers(shared, fp8):
    big, how = spec("random:1.3b", "bf16"), {"size": LARGE, "config": PRESETS["1.3b"], "device": DEVICE}
    settings = replace(DEFAULT, split=PatchSplit("spatial", 64, 16), fp8_buffers=fp8)
    ways = ["native", "native", "host", "host", "host"] + (["official", "official"] if official_version() else [])
    runs = [sample(through(shared, big), replace(settings, manager=manager), **how) for manager in ways]
    assert runs[0].kinds == "efsssfss" and runs[0].last.isfinite().all()
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run.latents, runs[0].latents, strict=True))
    for exchange in shared.status().exchanges:
        print(exchange)
    shared.trim()


@TWO
def test_trim_gives_the_memory_of_the_buffers_back(shared):
    big, how = spec("random:1.3b", "bf16"), {"size": LARGE, "config": PRESETS["1.3b"], "device": DEVICE}
    shared.ensure_ready(big)
    shared.trim()
    before = min(worker.used for worker in shared.status().workers)
    sample(through(shared, big), replace(DEFAULT, warmup_steps=1, sync_frequency=10), steps=3, **how)
    buffers = shared.status().exchanges[0].buffers
    held = min(worker.used for worker in shared.status().workers)
    shared.trim()
    after = min(worker.used for worker in shared.status().workers)
    assert buffers > 2**30 and held - before >= buffers
    assert after - before < buffers / 4  # NCCL keeps some


# Faults.


class Interrupted(BaseException):
    """Like ComfyUI's InterruptProcessingException."""


@TWO
@pytest.mark.parametrize("manager", ["host", "native"])
@pytest.mark.parametrize("kind", ["fill", "stale"])
def test_a_run_after_one_that_was_cancelled_is_right(shared, kind, manager):
    big, how = spec("random:1.3b", "bf16"), {"size": (21, 60, 104), "config": PRESETS["1.3b"], "device": DEVICE}
    split = PatchSplit("spatial", 64, 16)
    settings = replace(DEFAULT, warmup_steps=1, sync_frequency=10, split=split, manager=manager)
    forward, schedule = through(shared, big), Schedule()
    fresh = sample(forward, settings, steps=3, **how)
    pids = shared.worker_pids

    def interrupt():
        raise Interrupted

    def cancelled(x, timestep, context, part):
        poll = interrupt if part.kind == kind else None
        return shared.forward(big, x, timestep, context, poll=poll, displaced=part)

    with pytest.raises(Interrupted):
        sample(cancelled, settings, steps=3, schedule=schedule, **how)
    again = sample(forward, settings, steps=3, schedule=schedule, **how)
    assert torch.equal(again.last, fresh.last)
    assert shared.worker_pids == pids


@MANAGERS
@TWO
def test_a_worker_that_dies_in_a_gather_fails_the_run_and_the_next_one_is_right(shared, path, manager):
    settings, killed = replace(DEFAULT, manager=manager), []
    forward = through(shared, spec(path))
    fresh = sample(forward, settings, **HERE)
    victim = shared.worker_pids[1]

    def kill():
        if not killed:
            killed.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)

    def dying(x, timestep, context, part):
        if part.kind != STALE:
            return forward(x, timestep, context, part)
        os.kill(victim, signal.SIGSTOP)  # the other one's gathers of this step stay under way
        return shared.forward(spec(path), x, timestep, context, poll=kill, displaced=part)

    with pytest.raises(WorkerDied, match="rank 1"):
        sample(dying, settings, **HERE)
    assert time.monotonic() - killed[0] <= 5
    assert torch.equal(sample(forward, settings, **HERE).last, fresh.last)
    assert victim not in shared.worker_pids
