"""PipeFusion on real GPUs, over NCCL: every step is what patch after patch through all blocks gives in one process."""

from __future__ import annotations

import pytest
from testkit import tiny
from testkit.shared.divided import STEPS, STREAMED_SIZES, UNEVEN, step_inputs, streamed_in_one_process
from wan_parallel.distributed.client.pool import acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings

PLANS = [
    ParallelPlan(2, pipeline_parallel=2),
    ParallelPlan(4, pipeline_parallel=4),
    ParallelPlan(4, pipeline_parallel=2),
    ParallelPlan(4, pipeline_parallel=2, data_parallel=2),
]
LIMITS = {"fp32": 1e-4, "bf16": 3e-2}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("uneven") / "uneven.safetensors", UNEVEN)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_step_of_a_run_is_that_of_one_process(plan, path):
    pool = acquire(PoolSettings(plan, "cuda", pipeline_mode="pipefusion"))
    try:
        for size in STREAMED_SIZES:
            expected = streamed_in_one_process(path, plan, size)
            for dtype, limit in LIMITS.items():
                for step, kind in enumerate(STEPS):
                    run, branch_ids = f"{size} {dtype}", ("conditional", "unconditional")
                    part = Displaced(kind, run, branch_ids, PatchSplit(), strategy="pipefusion")
                    given = (tensor.cuda() for tensor in step_inputs(size, step))
                    got = pool.forward(ModelSpec(path, dtype, dtype), *given, displaced=part)
                    assert tiny.relative_error(got.cpu(), expected[step]) <= limit, (size, dtype, kind)
    finally:
        pool.close()
