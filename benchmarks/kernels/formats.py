"""What each format of Wan files costs and loses on this machine: GPU memory, seconds of a forward, error.

    python3 benchmarks/kernels/formats.py --size 14b --blocks 2 --res 480p --out benchmarks/results/formats.jsonl

Writes a file of random weights in each format, as the tools that people use write them
(tests/support/testkit/format_files.py), and one of the numbers that it stands for, in fp32; both are removed again.
Prints a JSON line for each format, and a table in Markdown. Needs `pip install gguf`. Blocks of the K formats are
random digits, as its package cannot make them from
numbers: these files hold other weights than the rest.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import benchlib
from benchlib.flops import latent_size
from benchlib.rows import Line, machine_fields, publish
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import CHOICES
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.base.config import PRESETS, WanConfig
from wan_parallel.wanvideo.checkpoint.weight_source import file_stamp

log = logging.getLogger("formats")

if find_spec("gguf") is None:
    sys.exit("gguf is not installed, by which the files are written. Install it with: pip install gguf")
sys.path.append(str(benchlib.ROOT / "tests" / "support"))
from testkit import (
    format_files,
    tiny,
)
from testkit.format_files import Tensors

GIB = 2**30
TOY = "tiny"
CHECKED = (3, 24, 32)
"""Latent frames, rows and columns of the forward whose error is measured."""


@dataclass(frozen=True)
class FormatRow(Line):
    """One model of `blocks` blocks in one format, at batch 1 on one GPU.

    file_gib: of the file. weights_gib: its weights on the GPU, of_16_bit: beside two bytes for each number.
    activations_gib: what a forward at `res` takes beside them, and s: its median seconds.
    error: relative distance of a small forward from that with the dequantised weights in the same precision;
    error_fp32: from that with the dequantised weights in fp32, which error_16_bit is of the dequantised weights alone.
    """

    format: str
    held_as: str
    size: str
    blocks: int
    res: str
    precision: str
    file_gib: float
    weights_gib: float
    of_16_bit: float
    activations_gib: float | None
    s: float
    error: float
    error_fp32: float
    error_16_bit: float
    finite: bool
    attention: str
    placement: str
    gpu: str
    versions: dict[str, str]
    date: str


Make = Callable[[Tensors], tuple[Tensors, Tensors]]


@dataclass(frozen=True)
class Format:
    """How a file is written; `dtype` is that of weights which are not quantised, "" for the precision of the run."""

    make: Make | None = None  # None is GGUF
    kind: str = ""
    dtype: str = ""

    def write(self, weights: Tensors, path: Path) -> Tensors:
        """Write the file; returns the float32 weights that it stands for."""
        if self.make is None:
            return format_files.write_gguf(path, self.kind, weights=weights)[1]
        stored, meant = self.make(dict(weights))
        tiny.write_weights(path, stored)
        return meant


def _plain(dtype: torch.dtype) -> Make:
    """Matrices in `dtype`, the rest in fp32."""

    def make(weights: Tensors) -> tuple[Tensors, Tensors]:
        stored = {name: weight.to(dtype) if weight.ndim == 2 else weight for name, weight in weights.items()}
        return stored, {name: weight.float() for name, weight in stored.items()}

    return make


def _fp8(dtype: torch.dtype) -> Make:
    return lambda weights: format_files.plain_fp8(weights, dtype)


FORMATS = {
    "bf16": Format(_plain(torch.bfloat16)),
    "fp16": Format(_plain(torch.float16), dtype="fp16"),
    "fp8 e4m3": Format(_fp8(torch.float8_e4m3fn)),
    "fp8 e5m2": Format(_fp8(torch.float8_e5m2)),
    "fp8_scaled, older": Format(format_files.old_comfy),
    "fp8_scaled, newer": Format(format_files.new_comfy),
    "fp8_scaled, kijai's": Format(format_files.kijai),
    "GGUF Q8_0": Format(kind="Q8_0"),
    "GGUF Q6_K": Format(kind="Q6_K"),
    "GGUF Q5_K": Format(kind="Q5_K"),
    "GGUF Q4_K": Format(kind="Q4_K"),
    "int8 convrot": Format(format_files.convrot),
    "nvfp4": Format(format_files.nvfp4),
    "mxfp8": Format(format_files.mxfp8),
}


class Bench:
    """One worker, and the weights that are written in all formats."""

    def __init__(self, pool: Pool, config: WanConfig, options: argparse.Namespace):
        self.pool, self.config, self.options = pool, config, options
        self.device = torch.device(pool.settings.device)
        self.weights = tiny.random_weights(config)

    def row(self, name: str, folder: Path) -> FormatRow:
        """Write, load and run one format."""
        given, options = FORMATS[name], self.options
        path = folder / ("model.gguf" if given.make is None else "model.safetensors")
        meant = folder / "meant.safetensors"
        tiny.write_weights(meant, given.write(self.weights, path))
        precision = given.dtype or options.precision
        file_bytes = path.stat().st_size
        log.info("%s: %.2f GiB", name, file_bytes / GIB)
        exact = self._forward(self._spec(meant, "fp32"))
        plain = self._forward(self._spec(meant, precision))
        self.pool.unload()
        spec = self._spec(path, precision)
        result = self._forward(spec)
        seconds = self._seconds(spec)
        worker = self.pool.status().workers[0]
        self.pool.unload()
        path.unlink()
        meant.unlink()
        model = worker.models[0]
        return FormatRow(
            format=name,
            held_as=model.weight_dtype,
            size=options.size,
            blocks=self.config.num_layers,
            res=options.res,
            precision=precision,
            file_gib=round(file_bytes / GIB, 3),
            weights_gib=round(model.device_bytes / GIB, 3),
            of_16_bit=round(model.device_bytes / (2 * self.config.parameters), 3),
            activations_gib=round(worker.memory.activations / GIB, 2) if self.device.type == "cuda" else None,
            s=round(seconds, 4),
            error=_distance(result, plain),
            error_fp32=_distance(result, exact),
            error_16_bit=_distance(plain, exact),
            finite=bool(torch.isfinite(result).all()),
            attention=model.kernel,
            placement=model.placement,
            **machine_fields(),
        )

    def _spec(self, path: Path, precision: str) -> ModelSpec:
        stamp = file_stamp(str(path))  # a later file has the same name
        return ModelSpec(str(path), precision, precision, stamp=stamp, offload=self.options.offload)

    def _forward(self, spec: ModelSpec) -> torch.Tensor:
        return self.pool.forward(spec, *self._inputs(CHECKED))

    def _seconds(self, spec: ModelSpec) -> float:
        given, times = self._inputs(latent_size(self.options.res, self.options.size)), []
        for _ in range(self.options.iters + 1):
            start = time.perf_counter()
            self.pool.forward(spec, *given)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return median(times[1:])

    def _inputs(self, latent: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(t.to(self.device) for t in tiny.inputs(self.config, latent, text_tokens=512))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(f"{tiny.relative_error(a, b):.2e}")


def table(rows: Sequence[FormatRow]) -> str:
    """The rows in Markdown."""
    first = rows[0]
    lines = [
        f"{first.size}, {first.blocks} blocks, {first.res}, one {first.gpu}, {first.date}",
        "",
        "| format | weights on the GPU, GiB | of 16 bit | s per forward | error against the dequantised weights | "
        "in fp32 | 16 bit alone in fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.format} | {row.weights_gib} | {row.of_16_bit} | {row.s} | {row.error:.1e} | "
            f"{row.error_fp32:.1e} | {row.error_16_bit:.1e} |"
        )
    return "\n".join(lines)


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    config = tiny.TINY if options.size == TOY else replace(PRESETS[options.size], num_layers=options.blocks)
    pool, rows = acquire(PoolSettings(ParallelPlan(1), device=options.device)), []
    try:
        bench = Bench(pool, config, options)
        with tempfile.TemporaryDirectory(prefix="wan-parallel-formats-", dir=options.folder) as folder:
            for name in options.formats:
                rows.append(bench.row(name, Path(folder)))
                publish(rows[-1], options.out)
    finally:
        pool.close()
    print(table(rows))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*sorted(PRESETS), TOY], default="14b", help=f"{TOY}: a trial on a CPU")
    parser.add_argument("--blocks", type=int, default=2, help="of the model's")
    parser.add_argument("--res", default="480p", help="480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the computation")
    parser.add_argument("--offload", choices=CHOICES, default="off")
    parser.add_argument("--iters", type=int, default=5, help="timed forwards, after one that is not")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--folder", type=Path, help="where the files are written; /dev/shm is fast")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
