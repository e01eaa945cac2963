"""Time one DiT forward of ours, and of the libraries beside us, on the GPUs of this machine.

    python3 benchmarks/dit_step.py --size 14b --res 720p --gpus 4 --peers

Prints one JSON line a case (see rows.py). Ours runs as it does for a user: through the launcher and the
workers, timed by the caller, with the latent on the first GPU as ComfyUI has it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from benchlib.busy import busy
from benchlib.flops import latent_size
from benchlib.rows import Row, Timing, make_row, publish
from benchlib.sparse_names import DENSE, attention_of
from wan_parallel.distributed.client.pool import Pool, acquire
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.plan.placement import CHOICES
from wan_parallel.distributed.protocol.reports import ModelStatus, WorkerStatus
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.wanvideo.attention.kernels import KERNEL_NAMES
from wan_parallel.wanvideo.base.config import PRESETS
from wan_parallel.wanvideo.base.grid import grid_of
from wan_parallel.wanvideo.checkpoint.header import read_header
from wan_parallel.wanvideo.checkpoint.weight_source import WEIGHT_DTYPES, model_config
from wan_parallel.wanvideo.model.fp8_mode import MODES, weights_for

log = logging.getLogger("dit_step")

HERE = Path(__file__).resolve().parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSSY_KERNELS = ("sageattn", "comfy_kitchen_int8")
FP8_MODES = dict(zip(("off", "linear", "attention"), MODES, strict=True))


@dataclass(frozen=True)
class Peer:
    """One way to run a library beside us."""

    lib: str
    attention: str
    compiled: bool

    @property
    def name(self) -> str:
        kernel = "" if self.attention == "cudnn" else f"-{self.attention}"
        return f"{self.lib}{kernel}{'-compiled' if self.compiled else ''}"

    def command(self, options: argparse.Namespace) -> list[str]:
        """Runs peers.py with one process a GPU. The address is spelt out: a hostname may not resolve."""
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nproc-per-node", str(options.gpus), "--master-addr", "127.0.0.1"]
        command += ["--master-port", str(free_port()), str(HERE / "peers" / "peers.py")]
        command += ["--lib", self.lib, "--attention", self.attention, "--precision", options.precision]
        command += ["--size", options.size, "--res", options.res, "--iters", str(options.iters)]
        command += ["--compile"] if self.compiled else []
        return command + (["--out", str(options.out)] if options.out else [])


PEERS = {
    peer.name: peer
    for peer in (
        Peer("diffusers", "cudnn", False),
        Peer("diffusers", "cudnn", True),
        Peer("xdit", "cudnn", False),
        Peer("xdit", "cudnn", True),
        Peer("xdit", "fa3", True),
    )
}


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    # Peers first: afterwards this process holds some of the first GPU's memory.
    failed = [name for name in _peers(options.peers) if not _run_peer(PEERS[name], options)]
    if not options.no_ours:
        for row in _ours(options):
            publish(row, options.out)
    for name in failed:
        log.error("%s failed; its words are above.", name)
    return 1 if failed else 0


def _ours(options: argparse.Namespace) -> list[Row]:
    pool, spec = pool_of(options), spec_of(options)
    more = {"shares": options.gpu_shares or None, "busy": options.busy or None}
    with busy(options.busy, torch.device(pool.settings.device)):
        try:
            cases = itertools.product(options.res.split(","), options.sparse)
            return [our_row(pool, spec, res, options, sparse, **more) for res, sparse in cases]
        finally:
            pool.close()


def pool_of(options: argparse.Namespace) -> Pool:
    """The pool that `add_options_of_ours` describes; not started yet."""
    plan = ParallelPlan(
        num_gpus=options.gpus,
        pipeline_parallel=options.pipeline,
        tensor_parallel=options.tensor,
        ulysses_degree=options.ulysses,
        ring_degree=options.ring,
        speeds=tuple(map(int, options.gpu_shares.split(","))) if options.gpu_shares else (),
    )
    return acquire(
        PoolSettings(
            plan,
            device=options.device,
            memory_fraction=options.memory_fraction,
            usp_backend=options.backend,
            overlap=options.overlap,
        )
    )


def spec_of(options: argparse.Namespace) -> ModelSpec:
    """The model that `add_options_of_ours` describes."""
    fp8_mode, path = FP8_MODES[options.fp8], options.model or f"random:{options.size}"
    header = read_header(path) if options.model else None
    return ModelSpec(
        path,
        weight_dtype=weights_for(header, fp8_mode, options.weights or options.precision),
        compute_dtype=options.precision,
        attention=options.attention,
        shard_weights=options.shard_weights,
        offload=options.offload,
        fp8_mode=fp8_mode,
    )


def is_lossy(spec: ModelSpec, model: ModelStatus) -> bool:
    """Whether something is computed below the asked precision on purpose."""
    return model.kernel in LOSSY_KERNELS or spec.weight_dtype != spec.compute_dtype or bool(model.fp8)


def our_row(
    pool: Pool, spec: ModelSpec, res: str, options: argparse.Namespace, sparse: str = DENSE, **more: object
) -> Row:
    """Time forwards of one resolution; `sparse` as `attention_of` takes it."""
    config = model_config(spec.path)
    device, dtype = torch.device(pool.settings.device), DTYPES[options.precision]
    batch = options.batch
    x = torch.randn(batch, config.in_dim, *latent_size(res, options.size), device=device, dtype=dtype)
    context = torch.randn(batch, 512, config.text_dim, device=device, dtype=dtype)
    timestep = torch.full((batch,), 500.0, device=device)
    attention = attention_of(sparse)
    pool.ensure_ready(spec, tokens=grid_of(x).tokens, items=batch, attention=attention)
    times, hops = [], []
    for _ in range(options.iters + 1):
        start = time.perf_counter()
        out = pool.forward(spec, x, timestep, context, attention=attention)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        hops.append(pool.status().last_hop_seconds)
    workers = pool.status().workers
    model = workers[0].models[0]
    return make_row(
        lib="wanparallel",
        size=options.size,
        res=res,
        gpus=options.gpus,
        batch=batch,
        timing=Timing(times[0], tuple(times[1:])),
        config=config,
        peak_bytes=_peak_bytes(workers, device),
        precision=options.precision,
        attention=model.kernel,
        lossy=is_lossy(spec, model) or sparse != DENSE,
        sparse=None if sparse == DENSE else sparse,
        finite=bool(torch.isfinite(out).all()),
        backend=model.backend,
        ulysses=model.ulysses,
        ring=model.ring,
        overlapped=model.overlapped,
        link=workers[0].link if options.gpus > 1 else None,
        tensor=model.tensor,
        pipeline=model.pipeline,
        hop_s=round(median(hops[1:]), 4),
        fp8=model.fp8 or None,
        weights=None if model.weight_dtype == options.precision else model.weight_dtype,
        placement=model.placement,
        weights_gib=round(max(w.models[0].device_bytes for w in workers) / 2**30, 2),
        host_gib=round(sum(w.models[0].host_bytes for w in workers) / 2**30, 2),
        allocated_gib=round(max(worker.peak_allocated for worker in workers) / 2**30, 2),
        memory_fraction=options.memory_fraction,
        data=pool.settings.plan.data_parallel if pool.settings.plan.data_parallel > 1 else None,
        **more,
    )


def _peak_bytes(workers: tuple[WorkerStatus, ...], device: torch.device) -> int | None:
    return max(worker.used for worker in workers) if device.type == "cuda" else None


def _run_peer(peer: Peer, options: argparse.Namespace) -> bool:
    if peer.attention == "fa3" and find_spec("fa3_fwd_interface") is None:
        log.info("%s is left out: fa3-fwd is not installed.", peer.name)
        return True
    log.info("%s on %d GPUs", peer.name, options.gpus)
    return subprocess.run(peer.command(options), check=False).returncode == 0


def _peers(chosen: str) -> list[str]:
    return list(PEERS) if chosen == "all" else [name for name in chosen.split(",") if name]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def add_options_of_ours(parser: argparse.ArgumentParser) -> None:
    """How our forwards run."""
    parser.add_argument("--size", choices=sorted(PRESETS), default="14b")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--weights", choices=sorted(WEIGHT_DTYPES), help="of ours, where they are held in another one")
    parser.add_argument("--attention", choices=KERNEL_NAMES, default="auto")
    parser.add_argument("--fp8", choices=FP8_MODES, default="off", help="lossy: products (and self-attention) in fp8")
    parser.add_argument("--backend", choices=("auto", "native", "xfuser"), default="auto")
    parser.add_argument("--ulysses", type=int, default=0, help="0 is automatic")
    parser.add_argument("--ring", type=int, default=0, help="0 is automatic")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True, help="exchange meanwhile")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--gpu-shares", default="", help="of a sequence, by rank, such as 2,1; even without")
    parser.add_argument("--shard-weights", choices=CHOICES, default="auto")
    parser.add_argument("--offload", choices=CHOICES, default="auto")
    parser.add_argument("--memory-fraction", type=float, default=1.0, help="cap on each GPU's memory")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--model", help="a checkpoint of that --size; random weights without")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options_of_ours(parser)
    parser.add_argument("--res", default="480p,720p", help="comma-separated: 480p, 720p or FRAMESxROWSxCOLUMNS")
    parser.add_argument("--sparse", nargs="+", default=[DENSE], help="lossy: such as dense keep=0.1 tau=1.3,extra=256")
    parser.add_argument("--iters", type=int, default=5, help="timed forwards, after one that is not")
    parser.add_argument("--batch", type=int, default=1, help="items of a forward; 2 are the branches of cfg")
    parser.add_argument("--peers", nargs="?", const="all", default="", help=f"all, or of {', '.join(PEERS)}")
    parser.add_argument("--busy", default="", help="GPUs that run busy.py beside ours, such as 1")
    parser.add_argument("--no-ours", action="store_true", help="peers alone")
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    options = parser.parse_args()
    unknown = set(_peers(options.peers)) - PEERS.keys()
    if unknown:
        parser.error(f"There are no peers {', '.join(sorted(unknown))}. Use {', '.join(PEERS)}.")
    return options


if __name__ == "__main__":
    sys.exit(main())
