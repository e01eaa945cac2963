#!/usr/bin/env python3
"""How long the workers take to change a LoRA: the first one, another, none, with a rank and a model of your choice.

    python3 benchmarks/lora_swap.py --size 14b --gpus 4                      # random weights made on the GPU
    python3 benchmarks/lora_swap.py --size 14b --gpus 4 --folder /dev/shm    # a file of random weights, 27 GiB

Without `--folder` a weight that is read again is drawn again. With it the file is read as a checkpoint is; it is
deleted in the end. `--memory-fraction` low enough leaves no room on the GPUs for the weights behind a LoRA, so that
each change reads them again. The line of JSON has, in seconds: load (without LoRA), first (LoRA), other (another
strength), again (the first strength), off, and forward, which the others no longer contain: that of one small frame.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import struct
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import benchlib  # noqa: F401 (registers wan_parallel)
import torch
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.base.lora import LowRank

log = logging.getLogger("lora_swap")

_FILE_DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    config = PRESETS[options.size]
    config = replace(config, num_layers=options.blocks or config.num_layers)
    plan = ParallelPlan(options.gpus, tensor_parallel=options.tensor, pipeline_parallel=options.pipeline)
    pool = acquire(PoolSettings(plan, device=options.device, memory_fraction=options.memory_fraction))
    file = _write_file(options.folder, config, options.file_dtype) if options.folder else None
    spec = ModelSpec(
        str(file or f"random:{options.size}"), options.weights, "bf16", shard_weights=options.shard_weights
    )
    try:
        row = {"size": options.size, "gpus": options.gpus, "rank": options.rank, **_times(pool, spec, config, options)}
        row |= {"tensor": options.tensor, "pipeline": options.pipeline, "weights": options.weights}
        row |= {"file": options.file_dtype if file else "", "shard_weights": options.shard_weights}
        row |= {"gpu": pool.status().workers[0].device, "torch": torch.__version__, "date": str(date.today())}
    finally:
        pool.close()
        if file is not None:
            file.unlink()
    line = json.dumps(row)
    sys.stdout.write(line + "\n")
    if options.out:
        with open(options.out, "a") as out:
            out.write(line + "\n")
    return 0


def _times(pool: Pool, spec: ModelSpec, config: WanConfig, options: argparse.Namespace) -> dict[str, float]:
    pairs = _pairs(config, options.rank)
    uuids = (str(number) for number in itertools.count(1))

    def lora(strength: float) -> LoraSet:
        patches = {name: [LowRank(up, down, strength)] for name, (up, down) in pairs.items()}
        return LoraSet(next(uuids), lambda: patches)

    given = torch.randn(1, config.in_dim, 1, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, config.text_dim)

    def seconds(patches: LoraSet | None = None) -> float:
        began = time.perf_counter()
        out = pool.forward(spec, *given, patches)
        assert out.isfinite().all()
        log.info("%s: %.3f s", patches.uuid if patches else "no LoRA", time.perf_counter() - began)
        return time.perf_counter() - began

    _start(pool)
    first = lora(0.01)
    taken = {"load": seconds()}
    forward = min(seconds() for _ in range(3))
    taken |= {"first": seconds(first), "other": seconds(lora(0.02)), "again": seconds(lora(0.01)), "off": seconds()}
    return {name: round(s - forward, 3) for name, s in taken.items()} | {"forward": round(forward, 3)}


def _start(pool: Pool) -> None:
    """So that loading is timed without the start, and without what a GPU does once."""
    with pool.session():
        if pool.settings.device == "cuda":
            pool.ensure_ready(small := ModelSpec("random:1.3b", "bf16", "bf16"))
            pool.unload(small)


def _pairs(config: WanConfig, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A low-rank change of every matrix of the blocks, bf16."""
    return {
        name: (torch.randn(shape[0], rank).bfloat16(), torch.randn(rank, shape[1]).bfloat16())
        for name, shape in config.shapes().items()
        if name.startswith("blocks.") and len(shape) == 2
    }


def _write_file(folder: Path, config: WanConfig, dtype: str) -> Path:
    """A checkpoint of random weights; tensors of one shape are equal, as only their size matters."""
    name, kind = _FILE_DTYPES[dtype]
    header, end = {}, 0
    for key, shape in config.shapes().items():
        size = math.prod(shape) * kind.itemsize
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    contents = {
        shape: (torch.randn(math.prod(shape)) * 0.02).to(kind).view(torch.uint8).numpy().data
        for shape in set(config.shapes().values())
    }
    path = folder / "lora-swap-random.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in config.shapes().values():
            file.write(contents[shape])
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--weights", default="bf16", help="precision of the weights in the workers")
    parser.add_argument("--folder", type=Path, help="write a checkpoint there and load that")
    parser.add_argument("--file-dtype", choices=sorted(_FILE_DTYPES), default="bf16")
    parser.add_argument("--shard-weights", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--memory-fraction", type=float, default=0.95, help="cap on each GPU's memory")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--blocks", type=int, help="fewer than the model has, for a trial with --folder")
    parser.add_argument("--out", type=Path, help="append the line to this file too")
    options = parser.parse_args()
    if options.blocks and not options.folder:
        parser.error("Random weights without a file have all blocks. Give --folder with --blocks.")
    return options


if __name__ == "__main__":
    sys.exit(main())
