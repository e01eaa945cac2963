"""Time the decoding of a video by one of Wan's VAEs: ours on a pool of workers, and peers beside it.

    python3 benchmarks/vae_decode.py --res 480p,720p --gpus 4 --peers
    python3 benchmarks/vae_decode.py --vae 2.2 --res 720p --gpus 4 --peers
    python3 benchmarks/vae_decode.py --res 720p --gpus 4 --convolution triton,conv3d,conv2d --piece-mib 256,512,1024

Weights and latents are random: no speed depends on them. Ours is the whole way from a latent of the caller to frames
in its memory; peers leave the frames on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from benchlib.flops import MODELS, latent_size, vae_decode_flops
from benchlib.rows import Timing, VAERow, make_vae_row, publish
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.client.vae_client import VAEWeights, decode
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.protocol.specs import PoolSettings
from wan_parallel.wanvideo.example.vae_random import RELEASED, random_weights, vae_shapes
from wan_parallel.wanvideo.vae.vae_coder import Decoder
from wan_parallel.wanvideo.vae.vae_layers import WholeFrame
from wan_parallel.wanvideo.vae.vae_layout import KINDS
from wan_parallel.wanvideo.vae.vae_ops import CONVOLUTIONS, VAEOps

log = logging.getLogger("vae_decode")

HERE = Path(__file__).resolve().parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PEERS = ("diffusers", "distvae")
CHECKED = {"2.1": (3, 24, 32), "2.2": (3, 12, 16)}
"""Latent frames, rows and columns of the small video whose error is measured."""


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    # Peers first: afterwards this process holds some of the first GPU's memory.
    runs = itertools.product(_names(options.peers), options.vae.split(","))
    failed = [f"{name} ({vae})" for name, vae in runs if not _run_peer(name, vae, options)]
    if not options.no_ours:
        _ours(options)
    for name in failed:
        log.error("%s failed; its words are above.", name)
    return 1 if failed else 0


def _ours(options: argparse.Namespace) -> None:
    pool = acquire(PoolSettings(ParallelPlan(options.gpus), device=options.device))
    variants = itertools.product(
        options.vae.split(","),
        options.res.split(","),
        options.convolution.split(","),
        (int(mib) for mib in options.piece_mib.split(",")),
        options.axis.split(","),
    )
    try:
        for name, res, convolution, piece_mib, axis in variants:
            variant = VAEOptions(convolution, piece_mib, axis)
            publish(_our_row(pool, name, res, variant, options), options.out)
    finally:
        pool.close()


@cache
def _random_vae(name: str, dim: int | None) -> VAEWeights:
    tensors = random_weights(name, "decoder", dim)
    return VAEWeights(f"random {name}", vae_shapes(name, "decoder", dim), lambda: tensors)


def _our_row(pool: Pool, name: str, res: str, variant: VAEOptions, options: argparse.Namespace) -> VAERow:
    vae, size = _random_vae(name, options.dim), latent_size(res, MODELS[name])
    latent = torch.randn(1, RELEASED[name].latent, *size, generator=torch.Generator().manual_seed(0))
    times, hops, frames = [], [], None
    for _ in range(options.iters + 1):
        frames = None  # the frames of one decode take as much memory as its caller lets them
        start = time.perf_counter()
        decoded = decode(pool, vae, latent, options.precision, variant)
        times.append(time.perf_counter() - start)
        hops.append(times[-1] - decoded.seconds)
        frames = decoded.frames
        log.info("%s %s %s: %.3f s", name, res, variant, times[-1])
    finite = bool(torch.isfinite(frames).all())
    row = make_vae_row(
        lib="wanparallel",
        vae=name,
        res=res,
        gpus=options.gpus,
        timing=Timing(times[0], tuple(times[1:])),
        flops=vae_decode_flops(vae.shapes, size),
        precision=options.precision,
        finite=finite,
        convolution=variant.convolution,
        piece_mib=variant.piece_mib,
        axis=variant.axis,
        hop_s=round(median(hops[1:]), 4),
        allocated_gib=round(max(worker.peak_allocated for worker in pool.status().workers) / 2**30, 2),
    )
    if options.no_check:
        return row
    small = torch.randn(1, RELEASED[name].latent, *CHECKED[name], generator=torch.Generator().manual_seed(1))
    error, on_one = _errors(pool, vae, small, variant, options.precision)
    return replace(row, error=error, error_1gpu=on_one)


def _errors(
    pool: Pool, vae: VAEWeights, latent: torch.Tensor, variant: VAEOptions, precision: str
) -> tuple[float, float]:
    """Distance of a small video from the one decoded in float32: on the workers, and by torch on one GPU."""
    device = torch.device(pool.settings.device)
    ours = decode(pool, vae, latent, precision, variant).frames[0]
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    exact = _decoded_here(vae, latent, torch.float32, device)
    torch.backends.cudnn.allow_tf32 = allowed
    return _distance(ours, exact), _distance(_decoded_here(vae, latent, DTYPES[precision], device), exact)


def _decoded_here(vae: VAEWeights, latent: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    weights = {name: tensor.to(device, dtype) for name, tensor in vae.tensors().items()}
    with torch.inference_mode():
        decoder = Decoder(weights, VAEOps(device, dtype, "conv3d"))
        pieces = list(decoder.decode(latent[0].to(device), WholeFrame(tuple(latent.shape[-2:]))))
        return torch.cat(pieces).float().add_(1).div_(2).clamp_(0, 1).cpu()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(f"{float((a.double() - b.double()).norm() / b.double().norm()):.2e}")


def _run_peer(name: str, vae: str, options: argparse.Namespace) -> bool:
    if name == "distvae" and options.gpus == 1:
        log.info("distvae is left out: it shares a decode among GPUs.")
        return True
    if name == "distvae" and find_spec("distvae") is None:
        log.info("distvae is left out: it is not installed (pip install distvae==0.1.0).")
        return True
    workers = options.gpus if name == "distvae" else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port()), str(HERE / "peers" / "vae_peers.py")]
    command += ["--lib", name, "--vae", vae, "--res", options.res, "--iters", str(options.iters)]
    command += ["--precision", options.precision, "--device", options.device]
    command += ["--dim", str(options.dim)] if options.dim else []
    command += ["--out", str(options.out)] if options.out else []
    log.info("%s (%s) on %d GPUs", name, vae, workers)
    return subprocess.run(command, check=False).returncode == 0


def _names(chosen: str) -> list[str]:
    return list(PEERS) if chosen == "all" else [name for name in chosen.split(",") if name]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="2.1", help=f"comma-separated, of {', '.join(KINDS)}; 2.2 is that of the 5B")
    parser.add_argument("--res", default="720p", help="comma-separated: 480p, 720p or latent FRAMESxROWSxCOLUMNS")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--iters", type=int, default=5, help="timed decodes, after one that is not")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--convolution", default="auto", help=f"comma-separated, of {', '.join(CONVOLUTIONS)}")
    parser.add_argument("--piece-mib", default=str(VAEOptions().piece_mib), help="comma-separated")
    parser.add_argument("--axis", default="auto", help="comma-separated, of auto, rows, columns")
    parser.add_argument("--dim", type=int, help="of the VAE, if not the released one: for a trial on a CPU")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--peers", nargs="?", const="all", default="", help=f"all, or of {', '.join(PEERS)}")
    parser.add_argument("--no-ours", action="store_true", help="peers alone")
    parser.add_argument("--no-check", action="store_true", help="leave out the errors against float32")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    known_axes = "auto", "rows", "columns"
    for given, known in ((options.vae, KINDS), (options.convolution, CONVOLUTIONS), (options.axis, known_axes)):
        if set(given.split(",")) - set(known):
            parser.error(f"{given} is not of {', '.join(known)}.")
    if set(_names(options.peers)) - set(PEERS):
        parser.error(f"There are no peers {options.peers}. Use {', '.join(PEERS)}.")
    return options


if __name__ == "__main__":
    sys.exit(main())
