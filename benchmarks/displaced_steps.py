"""Time a sampling run on displaced patches against the exact path, with random weights.

    python3 benchmarks/displaced_steps.py --size 14b --res 480p --gpus 4 \\
        --variants exact spatial spatial,overlap=16 temporal,sync=5,fp8

Each variant is `exact`, or a split mode with words after it: size=64 (pixels to which borders snap), overlap=0
(pixels), warmup=4, sync=10, fp8 (buffers), manager=host|native|official. The latent moves from step to step as in
sampling: by the model's output, brought to the latent's norm, from noise level to noise level. One pool runs all
variants.

Prints one JSON line a variant and resolution. Peers are timed by dit_step.py --peers.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from benchlib.flops import latent_size
from benchlib.rows import Line, installed_versions, publish
from wan_parallel.distributed.approximate.kv_buffers import MANAGERS
from wan_parallel.distributed.approximate.schedule import EXACT, FILL, STALE, PatchSettings, Schedule
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import SPLIT_MODES, ParallelPlan, PatchSplit, PlanError
from wan_parallel.distributed.protocol.reports import Exchange, WorkerStatus
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention.kernels import KERNEL_NAMES
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.checkpoint.weight_source import model_config
from wan_parallel.wanvideo.example.sampling import flow_sigmas

log = logging.getLogger("displaced_steps")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LETTERS = {EXACT: "e", FILL: "f", STALE: "s"}


@dataclass(frozen=True)
class RunRow(Line):
    """One sampling run: `batch` latents, as many forwards a step as `data` groups share them out.

    s: median seconds of a step as the caller sees it: of the stale ones where there are any, else of the exact ones.
    s_exact, s_fill, s_stale: the same by kind. run_s: the whole run. kinds: one letter a step (exact, fill, stale).
    hidden: share of the exchange's time for which no GPU waited, median of the stale steps. received_gib: what
    arrived on a rank in a stale step. buffers_gib: what a rank keeps for it. peak_gib: the most device memory in use
    on any GPU after the run, as in `Row`. rel_to_exact: distance of the last latent from that of the exact run
    before it; the weights are random, so it tells that something was computed, not how a picture looks.
    p2p: whether NCCL may copy from GPU to GPU ("off" under NCCL_P2P_DISABLE=1).
    """

    lib: str
    variant: str
    size: str
    res: str
    gpus: int
    data: int
    batch: int
    steps: int
    s: float
    run_s: float
    kinds: str
    finite: bool
    precision: str
    attention: str
    p2p: str
    peak_gib: float | None
    gpu: str
    versions: dict[str, str]
    date: str
    hop_s: float
    ulysses: int
    ring: int
    lossy: bool
    s_exact: float | None = None
    s_fill: float | None = None
    s_stale: float | None = None
    hidden: float | None = None
    exchange_s: float | None = None
    waited_s: float | None = None
    received_gib: float | None = None
    buffers_gib: float | None = None
    manager: str | None = None
    rel_to_exact: float | None = None


@dataclass(frozen=True)
class Variant:
    """One way to run; `settings` is None for the exact path."""

    name: str
    settings: PatchSettings | None


@dataclass(frozen=True)
class Step:
    """One timed step of a run, with what each rank exchanged in it."""

    kind: str
    seconds: float
    hop: float
    exchanges: tuple[Exchange, ...]


def parse_variant(text: str) -> Variant:
    """A variant from words such as `spatial,overlap=16,fp8`.

    Raises:
        ValueError: a word is not known, or its value is of the wrong kind.
    """
    mode, *words = text.split(",")
    if mode == EXACT and not words:
        return Variant(text, None)
    if mode not in SPLIT_MODES:
        raise ValueError(f"'{mode}' is no way to run. Begin a variant with exact, {', '.join(SPLIT_MODES)}.")
    settings = PatchSettings(PatchSplit(mode))
    for word in words:
        key, _, value = word.partition("=")
        if key in ("size", "overlap") and value.isdecimal():
            settings = replace(settings, split=replace(settings.split, **{key: int(value)}))
        elif key in ("warmup", "sync") and value.isdecimal() and int(value) >= 1:
            settings = replace(settings, **{{"warmup": "warmup_steps", "sync": "sync_frequency"}[key]: int(value)})
        elif word == "fp8":
            settings = replace(settings, fp8_buffers=True)
        elif key == "manager" and value in MANAGERS:
            settings = replace(settings, manager=value)
        else:
            raise ValueError(
                f"'{word}' is no setting. Write size=64, overlap=16, warmup=4, sync=10, fp8, manager=host."
            )
    return Variant(text, settings)


class Bench:
    """One pool and one model, sampled again and again."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.path = options.model or f"random:{options.size}"
        self.config = model_config(self.path)
        self.spec = ModelSpec(
            self.path,
            weight_dtype=options.precision,
            compute_dtype=options.precision,
            attention=options.attention,
            max_batch=options.max_batch,
        )
        plan = ParallelPlan(options.gpus, options.data, ulysses_degree=options.ulysses, ring_degree=options.ring)
        self.pool: Pool = acquire(PoolSettings(plan, device=options.device))
        self.device = torch.device(self.pool.settings.device)
        self.exact: dict[str, torch.Tensor] = {}

    def row(self, variant: Variant, res: str) -> RunRow:
        """Run one variant, after two steps that open its connections.

        Raises:
            PlanError: the variant cannot work at this size.
        """
        options = self.options
        noise, context = self._inputs(res)
        connect = variant.settings and replace(variant.settings, warmup_steps=1, sync_frequency=options.steps + 2)
        self._run(connect, noise, context, self._sigmas()[:3])
        steps, x = self._run(variant.settings, noise, context, self._sigmas())
        workers = self.pool.status().workers
        self.pool.trim()
        if variant.settings is None:
            self.exact[res] = x
        return self._filled_in(variant, res, steps, x, workers)

    def _inputs(self, res: str) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, batch = DTYPES[self.options.precision], self.options.batch
        generator = torch.Generator().manual_seed(0)
        size = latent_size(res, self.options.size)
        # The branches of a guided step share the latent and differ in the text.
        noise = torch.randn(1, self.config.in_dim, *size, generator=generator).expand(batch, -1, -1, -1, -1)
        context = torch.randn(batch, 512, self.config.text_dim, generator=generator)
        return noise.to(self.device).contiguous(), context.to(self.device, dtype)

    def _sigmas(self) -> list[float]:
        return flow_sigmas(self.options.steps, self.options.shift).tolist()

    def _run(
        self, settings: PatchSettings | None, x: torch.Tensor, context: torch.Tensor, sigmas: list[float]
    ) -> tuple[list[Step], torch.Tensor]:
        schedule, branch_ids, steps = Schedule(), tuple(f"branch {i}" for i in range(len(x))), []
        for sigma, following in itertools.pairwise(sigmas):
            time_of_step = torch.full((len(x),), 1000 * sigma, device=self.device)
            start = time.perf_counter()
            part = schedule.plan(settings, self.spec, branch_ids, x, time_of_step) if settings else None
            v = self.pool.forward(self.spec, x, time_of_step, context, displaced=part)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            status = self.pool.status()
            kind = part.kind if part else EXACT
            steps.append(Step(kind, seconds, status.last_hop_seconds, status.exchanges if kind == STALE else ()))
            x = x + (following - sigma) * (x.norm() / v.norm().clamp_min(1e-12)) * v
        return steps, x

    def _filled_in(
        self, variant: Variant, res: str, steps: list[Step], x: torch.Tensor, workers: tuple[WorkerStatus, ...]
    ) -> RunRow:
        options, model = self.options, workers[0].models[0]
        by_kind = {kind: [step.seconds for step in steps if step.kind == kind] for kind in LETTERS}
        medians = {kind: round(median(times), 4) if times else None for kind, times in by_kind.items()}
        exact, cuda = self.exact.get(res), self.device.type == "cuda"
        return RunRow(
            lib="wanparallel",
            variant=variant.name,
            size=options.size,
            res=res,
            gpus=options.gpus,
            data=options.data,
            batch=options.batch,
            steps=options.steps,
            s=medians[STALE] or medians[EXACT] or medians[FILL],
            s_exact=medians[EXACT],
            s_fill=medians[FILL],
            s_stale=medians[STALE],
            run_s=round(sum(step.seconds for step in steps), 3),
            kinds="".join(LETTERS[step.kind] for step in steps),
            hop_s=round(median(step.hop for step in steps), 4),
            finite=bool(torch.isfinite(x).all()),
            rel_to_exact=None if exact is None or x is exact else round(float((x - exact).norm() / exact.norm()), 6),
            precision=options.precision,
            attention=model.kernel,
            lossy=bool(by_kind[STALE]),
            ulysses=model.ulysses,
            ring=model.ring,
            p2p="off" if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0") else "on",
            peak_gib=round(max(worker.used for worker in workers) / 2**30, 1) if cuda else None,
            gpu=torch.cuda.get_device_name() if cuda else "CPU",
            versions=installed_versions(),
            date=date.today().isoformat(),
            **_exchanged([step.exchanges for step in steps if step.exchanges]),
        )


def _exchanged(stale: list[tuple[Exchange, ...]]) -> dict[str, float | str]:
    """The fields of a row that the stale steps tell, by step and rank."""
    if not stale:
        return {}
    everyone = [rank for step in stale for rank in step]
    alone = median(max(rank.seconds for rank in step) for step in stale)
    waited = median(max(rank.waited for rank in step) for step in stale)
    return {
        "manager": everyone[0].manager,
        "hidden": round(max(0.0, 1 - waited / alone), 3) if alone else 0.0,
        "exchange_s": round(alone, 4),
        "waited_s": round(waited, 4),
        "received_gib": _gib(rank.received for rank in everyone),
        "buffers_gib": _gib(rank.buffers for rank in everyone),
    }


def _gib(values: Iterable[int]) -> float:
    return round(max(values) / 2**30, 4)


def main() -> int:
    """0: all variants ran; 1: some could not."""
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    bench, refused = Bench(options), False
    try:
        for res in options.res.split(","):
            for variant in options.variants:
                try:
                    publish(bench.row(variant, res), options.out)
                except PlanError as error:
                    refused = True
                    log.error("%s at %s: %s", variant.name, res, error)
    finally:
        bench.pool.close()
    return int(refused)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["exact", "spatial", "temporal", "spatiotemporal"])
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--res", default="480p", help="comma-separated: 480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--data", type=int, default=1, help="groups of GPUs that take different batch items")
    parser.add_argument("--batch", type=int, default=1, help="latents a step; 2 are a guided step's branches")
    parser.add_argument("--max-batch", type=int, default=1, help="latents that a GPU takes at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--attention", choices=KERNEL_NAMES, default="auto")
    parser.add_argument("--ulysses", type=int, default=0, help="of the synchronous steps; 0 is automatic")
    parser.add_argument("--ring", type=int, default=0, help="of the synchronous steps; 0 is automatic")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--model", help="a checkpoint of that --size; random weights without")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    try:
        options.variants = [parse_variant(text) for text in options.variants]
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
