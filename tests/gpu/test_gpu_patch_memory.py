"""What displaced patches take of real GPUs is what was computed before, and the status names the GPUs' link."""

from __future__ import annotations

import pytest
import torch
from wan_parallel.distributed.approximate.displaced_memory_estimate import gib, patch_memory
from wan_parallel.distributed.approximate.kv_buffers import official_version
from wan_parallel.distributed.approximate.patch_layout import split_grid, token_pixels
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import grid_of

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA GPUs", allow_module_level=True)

SPEC = ModelSpec("random:1.3b", slice_tokens=8192)
SPLIT = PatchSplit("spatial", 64, 16)
LATENT = (1, 16, 21, 60, 104)  # 81 frames of 832x480


@pytest.fixture(scope="module")
def pool():
    pool = Pool(PoolSettings(ParallelPlan(2), device="cuda"))
    yield pool
    pool.close()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("manager", ["native", "official", "host"])
def test_a_run_takes_the_memory_that_was_computed_and_gives_it_back(pool, manager, fp8):
    if manager == "official" and not official_version():
        pytest.skip("the official distrifuser is not installed")
    x, timestep, context = torch.randn(LATENT), torch.tensor([800.0]), torch.randn(1, 512, 4096)

    def forward(kind: str) -> None:
        step = Displaced(kind, f"{manager}-{fp8}", ("branch",), SPLIT, fp8, manager)
        pool.forward(SPEC, x, timestep, context, displaced=step)

    forward("exact")
    pool.trim()
    before = max(worker.used for worker in pool.status().workers)
    for kind in ("fill", "stale", "stale"):
        forward(kind)
    taken = max(worker.used for worker in pool.status().workers) - before
    config = PRESETS["1.3b"]
    layout = split_grid(grid_of(x), SPLIT, 2, token_pixels(config))
    need = patch_memory(
        config, layout, "bf16", "bf16", fp8_buffers=fp8, slice_tokens=SPEC.slice_tokens, manager=manager
    )
    print(f"{manager}, fp8 {fp8}: took {gib(taken)}, computed {need}")
    assert 0.9 * need.buffers <= taken <= 1.15 * (need.buffers + need.working) + 2**29  # NCCL has buffers of its own
    pool.trim()
    left = max(worker.used for worker in pool.status().workers) - before
    assert left < 1.25 * 2**30  # of the communicators, which stay


def test_the_status_names_the_link(pool):
    pool.ensure_ready(SPEC)
    links = {worker.link for worker in pool.status().workers}
    print(links)
    assert links <= {"NVLink", "peer access", "host memory", "host memory (NCCL_P2P_DISABLE is set)"}
