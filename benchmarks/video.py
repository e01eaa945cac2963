"""Time a whole video of a few steps, from noise to frames: sampling and decoding on the same pool, and peers beside it.

    python3 benchmarks/video.py --size 14b --res 480p,720p --gpus 4 --peers
    python3 benchmarks/video.py --size 14b --res 720p --gpus 4 --fp8 attention --empty-caches

As graphs with lightx2v's LoRAs for 4 steps run: Euler, shift 5, CFG 1. Weights, noise and text are random: no speed
depends on them. Prints one JSON line for the first forward at each resolution, of which the first is cold, and one for
the videos (see rows.py). Text encoding is not in it, nor is writing a file.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import dit_step  # loads the pack
import torch
from benchlib.flops import latent_size
from benchlib.rows import FirstRow, VideoRow, machine_fields, publish
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.client.vae_client import VAEWeights, decode
from wan_parallel.distributed.comm.timing import LATENTS
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.protocol.specs import ModelSpec
from wan_parallel.wanvideo.base.grid import grid_of
from wan_parallel.wanvideo.checkpoint.weight_source import model_config
from wan_parallel.wanvideo.example.sampling import euler, flow_sigmas
from wan_parallel.wanvideo.example.vae_random import random_weights, vae_shapes

log = logging.getLogger("video")

HERE = Path(__file__).resolve().parent
PEERS = {"diffusers": False, "diffusers-compiled": True}
"""Whether the blocks are compiled."""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
"""Where compiled kernels are kept."""


@dataclass(frozen=True)
class Step:
    """Seconds of one step as its caller sees it, of the slowest worker's forward, and of copies of latents in that."""

    wall: float
    forward: float
    latents: float

    @property
    def own(self) -> float:
        """What is ours beside the model's computation and the exchanges in it."""
        return self.wall - self.forward + self.latents


@dataclass(frozen=True)
class Video:
    """Seconds of one video and of its parts; frames as ComfyUI has them, `shape` is [frames, height, width, 3]."""

    seconds: float
    steps: tuple[Step, ...]
    trim: float
    decode: float
    vae_hop: float
    shape: tuple[int, ...]
    finite: bool


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    with _caches(options.empty_caches):
        # Peers first: afterwards this process holds some of the first GPU's memory.
        failed = [name for name in _names(options.peers) if not _run_peer(name, options)]
        if not options.no_ours:
            _ours(options)
    for name in failed:
        log.error("%s failed; its words are above.", name)
    return 1 if failed else 0


@contextmanager
def _caches(empty: bool) -> Iterator[None]:
    """Let this process and those that it starts compile their kernels anew, if `empty`."""
    if not empty:
        yield
        return
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(prefix="wan-parallel-kernels-") as folder:
        os.environ |= {name: str(Path(folder, name.lower())) for name in CACHES}
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ |= {} if value is None else {name: value}


def _ours(options: argparse.Namespace) -> None:
    pool, spec = dit_step.pool_of(options), dit_step.spec_of(options)
    tensors, shapes = (make("2.1", "decoder", options.vae_dim) for make in (random_weights, vae_shapes))
    bench = Bench(pool, spec, VAEWeights("random", shapes, lambda: tensors), options)
    try:
        for res in options.res.split(","):
            publish(bench.first_row(res), options.out)
            publish(bench.video_row(res), options.out)
    finally:
        pool.close()


class Bench:
    """A pool with a model and a VAE, with which videos are made."""

    def __init__(self, pool: Pool, spec: ModelSpec, vae: VAEWeights, options: argparse.Namespace):
        self.pool, self.spec, self.vae, self.options = pool, spec, vae, options
        self.device = torch.device(pool.settings.device)
        self.cold = True

    def first_row(self, res: str) -> FirstRow:
        """Run the first forward at a resolution, and another."""
        noise, context = self._inputs(res)
        begin = time.perf_counter()
        started, loaded = None, None
        if self.cold:
            with self.pool.session():
                started = time.perf_counter() - begin
        self.pool.ensure_ready(self.spec, tokens=grid_of(noise).tokens)
        if self.cold:
            loaded = time.perf_counter() - begin - started
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            self._forward(noise, 1.0, context)
            self._synchronize()
            seconds.append(time.perf_counter() - begin)
        cold, self.cold = self.cold, False
        options, model = self.options, self.pool.status().workers[0].models[0]
        return FirstRow(
            lib="wanparallel",
            size=options.size,
            res=res,
            gpus=options.gpus,
            cold=cold,
            caches="empty" if options.empty_caches else "kept",
            s=round(seconds[0], 3),
            second_s=round(seconds[1], 4),
            precision=options.precision,
            attention=model.kernel,
            compiled=False,
            start_s=started and round(started, 2),
            load_s=loaded and round(loaded, 2),
            fp8=model.fp8 or None,
            overlapped=model.overlapped,
            **machine_fields(),
        )

    def video_row(self, res: str) -> VideoRow:
        """Make some videos of a resolution."""
        first, *videos = [self._video(res) for _ in range(self.options.videos + 1)]
        steps = [step for video in videos for step in video.steps]
        own, wall = median(step.own for step in steps), median(step.wall for step in steps)
        options, workers = self.options, self.pool.status().workers
        model = workers[0].models[0]
        return VideoRow(
            lib="wanparallel",
            size=options.size,
            res=res,
            gpus=options.gpus,
            steps=options.steps,
            shift=options.shift,
            videos=len(videos),
            s=_median(video.seconds for video in videos),
            sampling_s=_median(sum(step.wall for step in video.steps) for video in videos),
            step_s=round(wall, 4),
            decode_s=_median(video.decode for video in videos),
            first_s=round(first.seconds, 2),
            forward_s=_median(step.forward - step.latents for step in steps),
            own_s=round(own, 5),
            own_share=round(own / wall, 5),
            latents_s=round(median(step.latents for step in steps), 5),
            trim_s=_median(video.trim for video in videos),
            vae_hop_s=_median(video.vae_hop for video in videos),
            lossy=dit_step.is_lossy(self.spec, model),
            precision=options.precision,
            vae_precision=options.vae_precision,
            attention=model.kernel,
            compiled=False,
            finite=all(video.finite for video in videos),
            frames=first.shape,
            fp8=model.fp8 or None,
            weights=None if model.weight_dtype == options.precision else model.weight_dtype,
            placement=model.placement,
            backend=model.backend,
            ulysses=model.ulysses,
            ring=model.ring,
            overlapped=model.overlapped,
            tensor=model.tensor,
            pipeline=model.pipeline,
            allocated_gib=round(max(worker.peak_allocated for worker in workers) / 2**30, 2),
            **machine_fields(),
        )

    def _inputs(self, res: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and text, where and as ComfyUI has them."""
        config, generator = model_config(self.spec.path), torch.Generator().manual_seed(0)
        noise = torch.randn(1, config.in_dim, *latent_size(res, self.options.size), generator=generator)
        context = torch.randn(1, 512, config.text_dim, generator=generator)
        return noise.to(self.device), context.to(self.device, dit_step.DTYPES[self.options.precision])

    def _video(self, res: str) -> Video:
        noise, context = self._inputs(res)
        sigmas, steps = flow_sigmas(self.options.steps, self.options.shift), []
        self._synchronize()
        begin = moment = time.perf_counter()

        def note(_step: int, _x: torch.Tensor) -> None:
            nonlocal moment
            self._synchronize()
            now, times = time.perf_counter(), self.pool.last.times
            steps.append(Step(now - moment, max(t.total for t in times), _latents(self.pool)))
            moment = now

        latent = euler(lambda x, sigma: self._forward(x, sigma, context), noise, sigmas, note)
        self.pool.trim()  # as when a sampler of ComfyUI's ends
        trimmed = time.perf_counter()
        decoded = decode(self.pool, self.vae, latent, self.options.vae_precision, VAEOptions())
        frames = decoded.frames.flatten(0, 1)
        end = time.perf_counter()
        log.info("%s: %.3f s, steps of %s", res, end - begin, ", ".join(f"{step.wall:.3f}" for step in steps))
        hop = end - trimmed - decoded.seconds
        parts = tuple(steps), trimmed - moment, end - trimmed, hop
        return Video(end - begin, *parts, tuple(frames.shape), bool(torch.isfinite(frames).all()))

    def _forward(self, x: torch.Tensor, sigma: float, context: torch.Tensor) -> torch.Tensor:
        return self.pool.forward(self.spec, x, torch.full((1,), 1000 * sigma, device=self.device), context)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _latents(pool: Pool) -> float:
    """Seconds of the last forward in which a worker copied latents, the most of any."""
    return max(dict(times.exchanges).get(LATENTS, 0.0) for times in pool.last.times)


def _median(seconds: Iterator[float]) -> float:
    return round(median(seconds), 4)


def _run_peer(name: str, options: argparse.Namespace) -> bool:
    """diffusers with its context parallelism where there are several GPUs; --peer-gpus says on how many."""
    results = []
    for gpus in options.peer_gpus.split(",") if options.peer_gpus else [str(options.gpus)]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", gpus]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(dit_step.free_port())]
        command += [str(HERE / "peers" / "video_peers.py"), "--size", options.size, "--res", options.res]
        command += ["--videos", str(options.videos), "--steps", str(options.steps), "--shift", str(options.shift)]
        command += ["--precision", options.precision, "--vae-precision", options.vae_precision]
        command += ["--vae-dim", str(options.vae_dim), "--device", options.device]
        command += ["--compile"] if PEERS[name] else []
        command += ["--empty-caches"] if options.empty_caches else []
        command += ["--model", options.model] if options.model else []
        command += ["--out", str(options.out)] if options.out else []
        log.info("%s on %s GPUs", name, gpus)
        results.append(subprocess.run(command, check=False).returncode == 0)
    return all(results)


def _names(chosen: str) -> list[str]:
    return list(PEERS) if chosen == "all" else [name for name in chosen.split(",") if name]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dit_step.add_options_of_ours(parser)
    parser.add_argument("--res", default="480p,720p", help="comma-separated: 480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--videos", "--iters", type=int, default=5, help="timed videos, after one that is not")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--vae-precision", choices=sorted(dit_step.DTYPES), default="bf16")
    parser.add_argument("--vae-dim", type=int, default=96, help="of the VAE; smaller for a trial on a CPU")
    parser.add_argument(
        "--empty-caches",
        action="store_true",
        help="compile all kernels anew, for a first forward that is cold in every way",
    )
    parser.add_argument("--peers", nargs="?", const="all", default="", help=f"all, or of {', '.join(PEERS)}")
    parser.add_argument("--peer-gpus", help="comma-separated; as many as --gpus without")
    parser.add_argument("--no-ours", action="store_true", help="peers alone")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    unknown = set(_names(options.peers)) - PEERS.keys()
    if unknown:
        parser.error(f"There are no peers {', '.join(sorted(unknown))}. Use {', '.join(PEERS)}.")
    if options.size == "5b":
        parser.error("The 5B has another VAE, which is not measured here. Use --size 14b or 1.3b.")
    return options


if __name__ == "__main__":
    sys.exit(main())
