"""How long a model of one file takes to be ready on N GPUs, the start of the workers included, and what is read for it.

    python3 benchmarks/load.py --size 14b --gpus 1,2,4 --folder /tmp --out benchmarks/results/load.jsonl

Writes a bf16 safetensors file of random numbers (27 GB for the 14B) into a folder of its own, which it removes. Each
number of GPUs loads it twice: from the page cache, and from the disk after the file has been dropped from the cache.
Processes that map one file share its pages, so `disk_gib` counts what all workers together made the system fetch.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from benchlib.rows import Line, installed_versions, publish
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import CHOICES
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.checkpoint.weight_source import WEIGHT_DTYPES

log = logging.getLogger("load")

_CHUNK = 2**27  # numbers that the file repeats


@dataclass(frozen=True)
class LoadRow(Line):
    """One load by a new pool.

    cached: the file was in the page cache. s: seconds from nothing to all weights in place, of which start_s until the
    last worker was up. disk_gib: what the workers' reads and page faults fetched from storage while loading (the sum of
    read_bytes in /proc/PID/io), disk_ratio: of the file; None where the system does not count it. calls_gib: what they
    read by system calls (rchar). touched_gib: pages of the mapped file that each worker has used (Rss in smaps), added
    up over the workers, which share them.
    """

    size: str
    gpus: int
    cached: bool
    file_gib: float
    s: float
    start_s: float
    gib_per_s: float
    disk_gib: float | None
    disk_ratio: float | None
    calls_gib: float | None
    touched_gib: float
    placement: str
    weights: str
    device: str
    versions: dict[str, str]
    date: str


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    with tempfile.TemporaryDirectory(prefix="wan-parallel-load-", dir=options.folder) as folder:
        path = Path(folder) / f"{options.size}.safetensors"
        started = time.perf_counter()
        config = PRESETS[options.size]
        write_checkpoint(path, replace(config, num_layers=options.blocks or config.num_layers))
        log.info("%.1f GiB written in %.0f s", path.stat().st_size / 2**30, time.perf_counter() - started)
        for gpus in (int(number) for number in options.gpus.split(",")):
            for cached in (True, False) if not options.warm_only else (True,):
                (_warm if cached else _evict)(path)
                publish(_load(path, gpus, cached, options), options.out)
    return 0


def write_checkpoint(path: Path, config: WanConfig) -> None:
    """A safetensors file with every tensor of the model in bf16, in the order of its names."""
    header, end = {}, 0
    for name, shape in config.shapes().items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    numbers = torch.randn(min(_CHUNK, end // 2)).mul_(0.02).to(torch.bfloat16).view(torch.uint8).numpy()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(numbers)):
            file.write(numbers[: end - start])
        file.flush()
        os.fsync(file.fileno())


def _warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(2**26):
            pass


def _evict(path: Path) -> None:
    """Drop the file from the page cache, which its pages can leave as they are on the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load(path: Path, gpus: int, cached: bool, options: argparse.Namespace) -> LoadRow:
    pool = acquire(PoolSettings(ParallelPlan(gpus), device=options.device, memory_fraction=options.memory_fraction))
    spec = ModelSpec(
        str(path), weight_dtype=options.weights, shard_weights=options.shard_weights, offload=options.offload
    )
    pool.close()  # the start is measured, and the pool of these settings may have been started by somebody else
    try:
        begin = time.perf_counter()
        with pool.session():
            watch = _Watch(pool)
            pool.ensure_ready(spec)
        seconds = time.perf_counter() - begin
        disk, calls = watch.read()
        status = pool.status()
        touched = sum(_touched(worker.pid, path) for worker in status.workers)
    finally:
        pool.close()
    size = path.stat().st_size
    if not cached and disk is not None and disk < 0.5 * size:
        log.warning("Most of the file was still in the page cache, or its storage is not counted: see disk_gib.")
    return LoadRow(
        size=options.size,
        gpus=gpus,
        cached=cached,
        file_gib=_gib(size),
        s=round(seconds, 2),
        start_s=round(watch.up - begin, 2),
        gib_per_s=round(size / 2**30 / max(1e-9, begin + seconds - watch.up), 2),
        disk_gib=None if disk is None else _gib(disk),
        disk_ratio=None if disk is None else round(disk / size, 3),
        calls_gib=None if calls is None else _gib(calls),
        touched_gib=_gib(touched),
        placement=status.workers[0].models[0].placement,
        weights=status.workers[0].models[0].weight_dtype,
        device=status.workers[0].device,
        versions=installed_versions(),
        date=date.today().isoformat(),
    )


class _Watch:
    """Looks at the workers of a pool from now on: what they have read since."""

    def __init__(self, pool: Pool):
        self.pool, self.up = pool, time.perf_counter()
        self._before = _io(pool.worker_pids)

    def read(self) -> tuple[int | None, int | None]:
        """Bytes of all workers since then: from storage, and by system calls."""
        after = _io(self.pool.worker_pids)
        if after is None or self._before is None:
            return None, None
        disk, calls = (sum(a[i] - b[i] for a, b in zip(after, self._before, strict=True)) for i in (0, 1))
        return disk, calls


def _io(pids: Sequence[int]) -> list[tuple[int, int]] | None:
    """read_bytes and rchar of each process; None where the system does not tell."""
    try:
        texts = [Path(f"/proc/{pid}/io").read_text() for pid in pids]
    except OSError:
        return None
    fields = [dict(line.split(": ") for line in text.splitlines()) for text in texts]
    return [(int(f["read_bytes"]), int(f["rchar"])) for f in fields]


def _touched(pid: int, path: Path) -> int:
    """Bytes of a mapped file that the process has used."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(rf" {re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text))


def _gib(nbytes: int) -> float:
    return round(nbytes / 2**30, 2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--gpus", default=str(max(1, torch.cuda.device_count())), help="comma-separated numbers")
    parser.add_argument("--weights", choices=sorted(WEIGHT_DTYPES), default="bf16")
    parser.add_argument("--shard-weights", choices=CHOICES, default="auto")
    parser.add_argument("--offload", choices=CHOICES, default="auto")
    parser.add_argument("--memory-fraction", type=float, default=1.0, help="cap on each GPU's memory")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--folder", type=Path, help="where the file is written, on a disk")
    parser.add_argument("--warm-only", action="store_true", help="from the page cache alone")
    parser.add_argument("--blocks", type=int, help="fewer than the model has, for a trial")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
