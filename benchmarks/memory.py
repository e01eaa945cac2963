"""How much memory of each GPU a forward takes under a cap: 81 frames at 480p, on GPUs that shrink with their number.

    python3 benchmarks/memory.py --out benchmarks/results/memory.jsonl
    python3 benchmarks/memory.py --auto --batch 2     # sizes chosen as by parallel_plan auto, for both branches of cfg

The caps are those that the project promises: 48, 24, 12 and 6 GiB for the 14B on 1, 2, 4 and 8 GPUs, and 8, 4, 2 and 1
for the 1.3B. A larger GPU stands in for a smaller one by `gpu_memory_fraction`, which caps what torch's allocator
takes; the CUDA context, NCCL and the memory that other GPUs write into (`exchange_gib`) lie outside of it, and
`process_gib` has all of it. Where there are fewer GPUs, or with --simulate, one worker is simulated (simulation.py),
with --auto under the plan that H200s with NVLink would get.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from benchlib.flops import latent_size, tokens_of
from benchlib.rows import Line, installed_versions, publish
from benchlib.simulation import choose_plan, simulate
from wan_parallel.distributed.client.failures import OutOfMemory
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import CHOICES, PlacementError
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.checkpoint.weight_source import model_config

log = logging.getLogger("memory")

CAPS = {"14b": {1: 48, 2: 24, 4: 12, 8: 6}, "1.3b": {1: 8, 2: 4, 4: 2, 8: 1}}
"""GiB of each GPU, by model and number of GPUs."""
GIB = 2**30


@dataclass(frozen=True)
class MemoryRow(Line):
    """One forward in bf16 under a cap, with what the fullest GPU took, in GiB.

    simulated: one worker was simulated, on no GPU. fits: whether the forward ran, or would, and `refusal` what was
    said where not. allocated_gib: the most that torch's allocator gave out, while loading or computing; reserved_gib:
    the most it took from the GPU for that, which is what the cap counts; exchange_gib: beside it, what other GPUs write
    into; process_gib: all that the worker has on its GPU after the forwards. weights_gib: weights on the GPU, host_gib:
    those of all workers in host memory. s: median seconds of a forward after the first. auto: whether the sizes were
    chosen, and `reason` why these. batch: items of the forward, where that is not 1.
    """

    size: str
    res: str
    gpus: int
    cap_gib: float
    simulated: bool
    fits: bool
    gpu: str
    versions: dict[str, str]
    date: str
    slice_tokens: int
    plan: str | None = None
    refusal: str | None = None
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    exchange_gib: float | None = None
    process_gib: float | None = None
    weights_gib: float | None = None
    host_gib: float | None = None
    placement: str | None = None
    finite: bool | None = None
    s: float | None = None
    auto: bool = False
    reason: str | None = None
    batch: int | None = None


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    there = 0 if options.simulate else torch.cuda.device_count()
    rows = []
    for size in options.size.split(","):
        for gpus in (int(number) for number in options.gpus.split(",")):
            blank = _blank(size, gpus, options, simulated=gpus > there)
            log.info("%s on %d GPUs of %g GiB%s", size, gpus, blank.cap_gib, ", simulated" if gpus > there else "")
            rows.append(_simulated(blank, options) if gpus > there else _measured(blank, options))
            publish(rows[-1], options.out)
    return 0 if all(row.fits for row in rows) else 1


def _blank(size: str, gpus: int, options: argparse.Namespace, simulated: bool) -> MemoryRow:
    return MemoryRow(
        size=size,
        res=options.res,
        gpus=gpus,
        cap_gib=options.cap or CAPS[size][gpus],
        simulated=simulated,
        fits=False,
        gpu="none" if simulated else torch.cuda.get_device_name(),
        versions=installed_versions(),
        date=date.today().isoformat(),
        slice_tokens=options.slice_tokens,
        plan=None if options.auto else _describe(_plan(gpus, options), size),
        auto=options.auto,
        batch=options.batch if options.batch > 1 else None,
    )


def _describe(plan: ParallelPlan, size: str) -> str:
    return plan.describe(model_config(f"random:{size}").num_heads)


def _plan(gpus: int, options: argparse.Namespace) -> ParallelPlan:
    return ParallelPlan(gpus, pipeline_parallel=options.pipeline, tensor_parallel=options.tensor)


def _spec(size: str, options: argparse.Namespace) -> ModelSpec:
    return ModelSpec(
        f"random:{size}",
        slice_tokens=options.slice_tokens,
        shard_weights=options.shard_weights,
        offload=options.offload,
    )


def _simulated(row: MemoryRow, options: argparse.Namespace) -> MemoryRow:
    settings = PoolSettings(_plan(row.gpus, options), device="cuda", auto=options.auto)
    asked = _spec(row.size, options), latent_size(row.res, row.size), int(row.cap_gib * GIB), options.batch
    if options.auto:
        try:
            plan, why = choose_plan(settings, *asked)
        except PlacementError as error:
            return replace(row, refusal=str(error))
        settings = replace(settings, plan=plan)
        row = replace(row, plan=_describe(plan, row.size), reason=why.replace("; measured ", "; assumed "))
    found = simulate(settings, *asked)
    if found.refusal:
        return replace(row, refusal=found.refusal)
    return replace(
        row,
        fits=found.peak <= int(row.cap_gib * GIB),
        allocated_gib=_gib(found.peak),
        exchange_gib=_gib(found.exchange),
        weights_gib=_gib(found.weights),
        host_gib=_gib(found.host * row.gpus),
        placement=found.placement,
    )


def _measured(row: MemoryRow, options: argparse.Namespace) -> MemoryRow:
    total = torch.cuda.get_device_properties(0).total_memory
    fraction = row.cap_gib * GIB / total
    pool = acquire(PoolSettings(_plan(row.gpus, options), device="cuda", memory_fraction=fraction, auto=options.auto))
    try:
        return _forwards(row, pool, _spec(row.size, options), options)
    except (PlacementError, OutOfMemory) as error:
        return replace(row, refusal=str(error))
    finally:
        pool.close()


def _forwards(row: MemoryRow, pool: Pool, spec: ModelSpec, options: argparse.Namespace) -> MemoryRow:
    """The inputs are on the CPU, so that this process takes nothing of a GPU."""
    config, latent = model_config(spec.path), latent_size(row.res, row.size)
    batch = options.batch
    given = torch.randn(batch, config.in_dim, *latent), torch.full((batch,), 500.0)
    given += (torch.randn(batch, 512, config.text_dim),)
    pool.ensure_ready(spec, tokens=tokens_of(latent), items=batch)
    times = []
    for _ in range(options.iters + 1):
        start = time.perf_counter()
        out = pool.forward(spec, *given)
        times.append(time.perf_counter() - start)
    status = pool.status()
    workers = status.workers
    return replace(
        row,
        plan=_describe(status.settings.plan, row.size),
        reason=status.plan_reason or None,
        fits=max(worker.peak_reserved for worker in workers) <= row.cap_gib * GIB,
        allocated_gib=_gib(max(worker.peak_allocated for worker in workers)),
        reserved_gib=_gib(max(worker.peak_reserved for worker in workers)),
        process_gib=_gib(max(worker.used for worker in workers)),
        weights_gib=_gib(max(worker.models[0].device_bytes for worker in workers)),
        host_gib=_gib(sum(worker.models[0].host_bytes for worker in workers)),
        placement=workers[0].models[0].placement,
        finite=bool(torch.isfinite(out).all()),
        s=round(median(times[1:]), 4),
    )


def _gib(nbytes: int) -> float:
    return round(nbytes / GIB, 2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="14b,1.3b", help=f"comma-separated, of {', '.join(CAPS)}")
    parser.add_argument("--gpus", default="1,2,4,8", help="comma-separated numbers")
    parser.add_argument("--res", default="480p", help="480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--cap", type=float, help="GiB of each GPU, in place of the promised ones")
    parser.add_argument("--slice-tokens", type=int, default=8192, help="as max_sequence_length; 0 takes all at once")
    parser.add_argument("--auto", action="store_true", help="sizes that are 1 here are chosen")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="items of a forward; 2 are the branches of cfg")
    parser.add_argument("--shard-weights", choices=CHOICES, default="auto")
    parser.add_argument("--offload", choices=CHOICES, default="auto")
    parser.add_argument("--iters", type=int, default=2, help="timed forwards, after one that is not")
    parser.add_argument("--simulate", action="store_true", help="everything, also where there are GPUs")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    for size in options.size.split(","):
        missing = [gpus for gpus in options.gpus.split(",") if int(gpus) not in CAPS.get(size, {})]
        if size not in CAPS or (missing and not options.cap):
            parser.error(f"There is no cap for {size} on {', '.join(missing)} GPUs. Give one with --cap.")
    return options


if __name__ == "__main__":
    sys.exit(main())
