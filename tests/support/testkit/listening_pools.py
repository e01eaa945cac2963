"""Starts pools of every kind of parallelism, one after the other, and prints as JSON who listened meanwhile.

    python -m testkit.listening_pools CHECKPOINT KIND...

Tests run it in a network namespace of its own, where nobody else listens. Each line that it prints is of one pool: its
kind, the addresses of all TCP and UDP sockets of this namespace on which somebody waits for others, whether the forward
was right, or the error.
"""

from __future__ import annotations

import json
import sys

from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.plan.degrees import ParallelPlan, PatchSplit
from wan_parallel.distributed.protocol.pool_errors import PoolError
from wan_parallel.distributed.protocol.requests import Displaced
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.model.model import WanModel

import testkit  # noqa: F401 (registers wan_parallel)
from testkit import tiny
from testkit.processes import all_listening

PATCHES = Displaced("fill", "run", ("a", "b"), PatchSplit("temporal"), manager="native")
PIPEFUSION = Displaced("fill", "run", ("a", "b"), PatchSplit(), strategy="pipefusion")
POOLS = {
    "alone": (PoolSettings(ParallelPlan(1), device="cpu"), None),
    "ulysses, ring, patches": (PoolSettings(ParallelPlan(4, ulysses_degree=2, ring_degree=2), device="cpu"), PATCHES),
    "tensor, pipeline, pipefusion": (
        PoolSettings(ParallelPlan(4, 1, 2, 2), device="cpu", pipeline_mode="pipefusion"),
        PIPEFUSION,
    ),
}


def main(checkpoint: str, *kinds: str) -> None:
    spec, given = ModelSpec(checkpoint, "fp32", "fp32"), tiny.inputs(size=(4, 8, 8), batch=2)
    expected = WanModel.from_checkpoint(checkpoint)(*given)
    for kind in kinds:
        settings, approximate = POOLS[kind]
        pool, found = Pool(settings), {"kind": kind}
        try:
            results = [pool.forward(spec, *given, displaced=how) for how in {None, approximate}]
            found["right"] = all(tiny.relative_error(result, expected) <= 2e-6 for result in results)
            found["listening"] = all_listening()
        except PoolError as error:
            found["error"] = str(error)
        finally:
            pool.close()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
