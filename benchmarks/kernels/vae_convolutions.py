"""Time the convolutions of Wan's VAEs one by one on this machine's first GPU, each way they can be computed.

    python3 benchmarks/kernels/vae_convolutions.py --strips 4

prints a line for each: layer, way, milliseconds and TFLOP/s, and the error against torch. The fastest tiles are what
`vae_triton.default_tile` should choose.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import benchlib  # noqa: F401 (registers wan_parallel)
from wan_parallel.wanvideo.vae import vae_ops

if TYPE_CHECKING:
    from wan_parallel.wanvideo.vae.vae_triton import Tile

# Layer: input and output channels, kernel, frames of a piece, output rows and columns of a 720p video. Wan 2.1's
# decoder, then Wan 2.2's (5b) and its encoder's finest layers.
LAYERS = {
    "first": (16, 384, (3, 3, 3), 21, 90, 160),
    "stage0": (384, 384, (3, 3, 3), 21, 90, 160),
    "time0": (384, 768, (3, 1, 1), 20, 90, 160),
    "up1": (384, 192, (1, 3, 3), 16, 180, 320),
    "stage1-first": (192, 384, (3, 3, 3), 16, 180, 320),
    "stage1": (384, 384, (3, 3, 3), 16, 180, 320),
    "time1": (384, 768, (3, 1, 1), 16, 180, 320),
    "up2": (384, 192, (1, 3, 3), 8, 360, 640),
    "stage2": (192, 192, (3, 3, 3), 8, 360, 640),
    "up3": (192, 96, (1, 3, 3), 4, 720, 1280),
    "stage3": (96, 96, (3, 3, 3), 4, 720, 1280),
    "head": (96, 3, (3, 3, 3), 4, 720, 1280),
    "5b-stage0": (1024, 1024, (3, 3, 3), 31, 44, 80),
    "5b-stage1": (1024, 1024, (3, 3, 3), 16, 88, 160),
    "5b-up2": (1024, 1024, (1, 3, 3), 4, 176, 320),
    "5b-stage2": (512, 512, (3, 3, 3), 4, 176, 320),
    "5b-up3": (512, 512, (1, 3, 3), 2, 352, 640),
    "5b-stage3-first": (512, 256, (3, 3, 3), 2, 352, 640),
    "5b-stage3": (256, 256, (3, 3, 3), 2, 352, 640),
    "5b-head": (256, 12, (3, 3, 3), 2, 352, 640),
    "5b-encode0": (160, 160, (3, 3, 3), 4, 352, 640),
    "5b-encode1": (320, 320, (3, 3, 3), 4, 176, 320),
}
# By output channels: positions, channels in two parts, inputs, warps, stages
TILES = {
    128: (
        *((128, 128, 0, 32, 8, 4), (128, 128, 0, 32, 4, 4), (128, 128, 0, 64, 8, 3), (128, 128, 0, 64, 8, 4)),
        *((128, 128, 0, 64, 4, 3), (128, 128, 64, 64, 8, 3), (128, 128, 64, 32, 8, 4), (256, 128, 0, 32, 8, 4)),
        *((256, 128, 0, 64, 8, 3), (64, 128, 0, 64, 4, 4), (128, 256, 0, 64, 8, 3)),
    ),
    192: (
        *((128, 128, 64, 32, 8, 4), (128, 128, 64, 64, 8, 3), (128, 64, 0, 64, 4, 4), (128, 64, 0, 32, 4, 4)),
        *((256, 64, 0, 64, 8, 3), (256, 64, 0, 32, 8, 4), (64, 128, 64, 64, 4, 3), (128, 128, 64, 32, 8, 5)),
    ),
    96: (
        *((128, 64, 32, 32, 4, 4), (128, 64, 32, 32, 8, 4), (256, 64, 32, 32, 8, 4), (256, 64, 32, 32, 8, 3)),
        *((128, 128, 0, 32, 8, 4), (128, 128, 0, 32, 4, 4), (256, 128, 0, 32, 8, 3), (64, 64, 32, 32, 4, 5)),
        *((128, 64, 32, 64, 4, 3), (256, 64, 32, 64, 8, 3), (128, 128, 0, 64, 8, 3)),
    ),
    160: ((128, 128, 32, 32, 8, 4), (128, 128, 32, 32, 4, 4), (128, 128, 0, 32, 8, 4), (256, 128, 32, 32, 8, 3)),
    16: ((128, 16, 0, 32, 4, 4), (256, 16, 0, 32, 4, 4), (256, 16, 0, 32, 8, 4), (128, 16, 0, 32, 4, 6)),
}


def tiles(inputs: int, channels: int) -> Iterator[Tile]:
    """Tiles worth a try for a layer with so many inputs in a row and so many output channels."""
    from wan_parallel.wanvideo.vae.vae_triton import Tile

    kind = 128 if channels % 128 == 0 else 160 if channels % 160 == 0 else channels if channels in TILES else 16
    for fields in TILES[kind]:
        tile = Tile(*fields)
        if inputs % tile.inputs == 0 and channels % (tile.channels + tile.more_channels) in (0, channels):
            yield tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(LAYERS), help="comma-separated")
    parser.add_argument("--strips", type=int, default=4, help="GPUs that share the columns of a frame")
    parser.add_argument("--sweep", action="store_true", help="all tiles of the Triton kernel, not its own choice alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU has torch's ways alone")
    parser.add_argument("--shrink", type=int, default=1, help="by which channels, rows and columns are divided")
    options = parser.parse_args()
    for layer in options.layers.split(","):
        _time_layer(layer, options)


def _time_layer(layer: str, options: argparse.Namespace) -> None:
    before, after, kernel, frames, rows, columns = LAYERS[layer]
    before, after, rows, columns = (max(1, n // options.shrink) for n in (before, after, rows, columns))
    columns = max(1, columns // options.strips)
    kt, kh, kw = kernel
    device, dtype = torch.device(options.device), torch.bfloat16
    buffer = torch.randn(frames + kt - 1, rows + kh - 1, columns + kw - 1, before, device=device, dtype=dtype)
    weight = torch.randn(after, before, *kernel, device=device, dtype=dtype) / (before * kt * kh * kw) ** 0.5
    bias = torch.randn(after, device=device, dtype=dtype)
    flops = 2 * weight.numel() * frames * rows * columns
    reference = None
    for way in ("conv3d", "conv3d_ncdhw", "conv2d"):
        conv = vae_ops.VAEOps(device, dtype, way).conv(weight, bias)
        reference = _report(layer, way, lambda conv=conv: conv(buffer, None), flops, reference)
    if device.type == "cpu":
        return
    from wan_parallel.wanvideo.vae import vae_triton

    own = vae_triton.default_tile(before * kw, after)
    others = [tile for tile in tiles(before * kw, after) if tile != own] if options.sweep else []
    for tile in (own, *others):
        conv = vae_triton.Conv(weight, bias, tile)
        _report(layer, f"triton {astuple(tile)}", lambda conv=conv: conv(buffer, None), flops, reference)


def _report(
    layer: str, way: str, run: Callable[[], torch.Tensor], flops: int, reference: torch.Tensor | None
) -> torch.Tensor:
    try:
        result = run()
        seconds = _seconds(run)
    except RuntimeError as error:  # too much shared memory, or a layout that this cuDNN lacks
        print(json.dumps({"layer": layer, "way": way, "failed": str(error).splitlines()[0][:100]}), flush=True)
        return reference
    except Exception as error:  # Triton's own errors have no common class
        print(json.dumps({"layer": layer, "way": way, "failed": f"{type(error).__name__}"}), flush=True)
        return reference
    line = {"layer": layer, "way": way, "ms": round(1000 * seconds, 3), "tflops": round(flops / seconds / 1e12, 1)}
    if reference is not None:
        line["error"] = float(f"{float((result - reference).float().norm() / reference.float().norm()):.1e}")
    print(json.dumps(line), flush=True)
    return result if reference is None else reference


def _seconds(run: Callable[[], torch.Tensor], repeats: int = 5) -> float:
    if run().device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats / 1000


if __name__ == "__main__":
    main()
