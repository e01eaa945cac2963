"""Time how a matrix in a format of blocks is dequantised on this machine's first GPU, by torch and by Triton.

    python3 benchmarks/kernels/dequantise.py --kinds Q8_0 Q6_K Q5_K Q4_K NVFP4 MXFP8

takes seconds and prints a JSON line for each. With --sweep it tries other programs than those that GGUF's kernels
choose, with --shares 4 a slice of columns as tensor parallelism makes it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchlib.rows import Line, machine_fields, publish
from wan_parallel.wanvideo.checkpoint.weight_source import DTYPES
from wan_parallel.wanvideo.ops import pointwise
from wan_parallel.wanvideo.quant.formats.block_scaled import GROUPS, BlockScaledWeight
from wan_parallel.wanvideo.quant.formats.gguf_blocks import BLOCKS, GgufWeight


@dataclass(frozen=True)
class DequantiseRow(Line):
    """One matrix of random bytes [rows, columns].

    torch_ms, triton_ms: of a call on the device; *_host_ms: until the host goes on. gb_per_s: the blocks read and the
    numbers written once, in Triton's time; copy_gb_per_s: what a copy of the numbers reaches, the most to hope for.
    first_s: Triton's first call, compiling included unless its cache on the disk has the kernel. differing: numbers
    unlike torch's; difference: the largest. program: numbers and warps of a program, where not the kernels' choice.
    """

    kind: str
    rows: int
    columns: int
    precision: str
    torch_ms: float
    torch_host_ms: float
    gpu: str
    versions: dict[str, str]
    date: str
    triton_ms: float | None = None
    triton_host_ms: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    first_s: float | None = None
    differing: int | None = None
    difference: float | None = None
    program: tuple[int, int] | None = None


def random_weight(kind: str, rows: int, columns: int, device: torch.device) -> GgufWeight | BlockScaledWeight:
    """Any bytes: scales are of every size, some no numbers."""

    def random(width: int) -> torch.Tensor:
        return torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=device)

    if kind in GROUPS:
        groups, scale = columns // GROUPS[kind].numbers, torch.ones(1, 1, device=device)
        return BlockScaledWeight(kind, random(groups * GROUPS[kind].nbytes), random(groups), scale, columns)
    return GgufWeight(kind, random(columns // BLOCKS[kind].numbers * BLOCKS[kind].nbytes), columns)


def measure(kind: str, weight: GgufWeight | BlockScaledWeight, options: argparse.Namespace) -> Iterator[DequantiseRow]:
    """A row for the kernels' own choice, and with --sweep for others."""
    dtype, device = DTYPES[options.precision], weight.device
    plain = weight.dequantize_by_torch(dtype)
    by_torch = _cost(lambda: weight.dequantize_by_torch(dtype), device, options.iters)
    row = DequantiseRow(
        kind=kind,
        rows=weight.shape[0],
        columns=weight.columns,
        precision=options.precision,
        torch_ms=by_torch.ms,
        torch_host_ms=by_torch.host_ms,
        **machine_fields(),
    )
    if not pointwise.use_triton(device):
        yield row
        return
    from wan_parallel.wanvideo.quant import block_scaled_triton, gguf_triton

    module = block_scaled_triton if kind in GROUPS else gguf_triton
    copy = _cost(plain.clone, device, options.iters)
    others = itertools.product((1024, 2048, 4096, 8192), (2, 4, 8)) if options.sweep and kind in BLOCKS else ()
    for program in ((), *others):
        run = partial(module.dequantize, weight, dtype, *program)
        begin = time.perf_counter()
        got = run()
        torch.cuda.synchronize()
        first, cost = time.perf_counter() - begin, _cost(run, device, options.iters)
        yield replace(
            row,
            triton_ms=cost.ms,
            triton_host_ms=cost.host_ms,
            gb_per_s=round((weight.nbytes + plain.nbytes) / cost.ms / 1e6, 1),
            copy_gb_per_s=round(2 * plain.nbytes / copy.ms / 1e6, 1),
            first_s=round(first, 3),
            program=program or None,
            **_compared(got, plain),
        )


def _compared(got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """How many numbers differ, of those that are numbers, and by how much at most."""
    differing = (got != expected) & ~(got.isnan() & expected.isnan())
    distances = (got[differing].double() - expected[differing].double()).abs()
    return {"differing": len(distances), "difference": float(distances.max()) if len(distances) else 0.0}


@dataclass(frozen=True)
class Cost:
    """Of one call in milliseconds: on the device, and until the host goes on."""

    ms: float
    host_ms: float


def _cost(run: Callable[[], torch.Tensor], device: torch.device, iters: int) -> Cost:
    run()
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(iters):
            run()
        ms = 1000 * (time.perf_counter() - begin) / iters
        return Cost(round(ms, 4), round(ms, 4))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # some 30 ms, in which the host gets ahead
    start.record()
    begin = time.perf_counter()
    for _ in range(iters):
        run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return Cost(round(start.elapsed_time(end) / iters, 4), round(1000 * host / iters, 4))


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    for kind in options.kinds:
        weight = random_weight(kind, options.rows, options.columns, device)
        if options.shares > 1:
            share = options.columns // options.shares
            weight = weight.narrow(1, share, share).contiguous()
        for row in measure(kind, weight, options):
            publish(row, options.out)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=(*BLOCKS, *GROUPS), default=[*BLOCKS, *GROUPS], metavar="KIND")
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--columns", type=int, default=13824, help="a multiple of 256")
    parser.add_argument("--shares", type=int, default=1, help="GPUs that share the columns; the second's are taken")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of the numbers")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="programs of other sizes too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU has torch's way alone")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
