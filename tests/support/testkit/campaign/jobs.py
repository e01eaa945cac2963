"""The work during which faults happen: one short run for each way to share a forward, and for either half of a VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from wan_parallel.distributed.approximate.schedule import PatchSettings, Schedule
from wan_parallel.distributed.client.pool import Pool
from wan_parallel.distributed.client.rpc import Poll
from wan_parallel.distributed.client.vae_client import VAEWeights, decode, encode
from wan_parallel.distributed.plan.degrees import ParallelPlan
from wan_parallel.distributed.protocol.requests import VAEOptions
from wan_parallel.distributed.protocol.specs import ModelSpec, PoolSettings
from wan_parallel.distributed.weights.lora_transfer import LoraSet
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.checkpoint.weight_source import file_stamp
from wan_parallel.wanvideo.example.vae_random import random_weights, vae_shapes

from testkit import tiny
from testkit.shared.lora_changes import some_lora

CONFIG = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=8, text_dim=64)
SIZE = (4, 20, 20)  # latent frames, rows, columns: 400 tokens, some tenths of a second on a core
VAE_DIM = 8
PIECES = VAEOptions(piece_mib=0)  # one frame after the other, each with a look at Cancel


@dataclass(frozen=True)
class Job:
    """One way to use a pool.

    Args:
        plan: of the pool.
        batch: items of each forward.
        patches: the approximate strategy, if it is one.
        lora: whether a LoRA is merged.
        vae: the half of the VAE that runs in place of the DiT.
    """

    plan: ParallelPlan
    batch: int = 1
    patches: PatchSettings | None = None
    lora: bool = False
    vae: str = ""

    @property
    def settings(self) -> PoolSettings:
        streamed = self.patches is not None and self.patches.strategy == "pipefusion"
        return PoolSettings(self.plan, device="cpu", pipeline_mode="pipefusion" if streamed else "exact")

    @property
    def steps(self) -> int:
        return 5 if self.patches else 3


JOBS = {
    "ulysses": Job(ParallelPlan(2, ulysses_degree=2)),
    "ring": Job(ParallelPlan(2, ring_degree=2)),
    "data": Job(ParallelPlan(2, data_parallel=2), batch=2),
    "tensor": Job(ParallelPlan(2, tensor_parallel=2)),
    "pipeline": Job(ParallelPlan(2, pipeline_parallel=2)),
    "lora": Job(ParallelPlan(2, ulysses_degree=2), lora=True),
    "displaced": Job(ParallelPlan(2), patches=PatchSettings(warmup_steps=1)),
    "pipefusion": Job(ParallelPlan(2, pipeline_parallel=2), patches=PatchSettings(strategy="pipefusion")),
    "decode": Job(ParallelPlan(2, ulysses_degree=2), vae="decoder"),
    "encode": Job(ParallelPlan(2, ulysses_degree=2), vae="encoder"),
    "ulysses x ring, 4": Job(ParallelPlan(4, ulysses_degree=2, ring_degree=2)),
    "data x tensor, 4": Job(ParallelPlan(4, data_parallel=2, tensor_parallel=2), batch=2),
}


def write_model(path: Path, seed: int) -> None:
    """Write a checkpoint that every user can read."""
    tiny.write_checkpoint(path, CONFIG, seed)
    path.chmod(0o644)


def do(job: Job, pool: Pool, path: Path, poll: Poll, step: Callable[[int], None]) -> torch.Tensor:
    """Run a job, and call `step` after each of its forwards; the result."""
    if job.vae:
        return _code(job, pool, poll)
    spec = ModelSpec(str(path), "fp32", "fp32", stamp=file_stamp(str(path)) if path.exists() else "")
    x, _, context = tiny.inputs(CONFIG, SIZE, job.batch)
    schedule, names = Schedule(), tuple(f"branch {item}" for item in range(job.batch))
    loras = LoraSet("some", lambda: some_lora(0.8)) if job.lora else None
    for index in range(job.steps):
        timestep = torch.full((job.batch,), 1000 * (1 - index / job.steps))
        part = schedule.plan(job.patches, spec, names, x, timestep) if job.patches else None
        x = x - 0.05 * pool.forward(spec, x, timestep, context, loras, poll, displaced=part)
        step(index)
    return x


def _code(job: Job, pool: Pool, poll: Poll) -> torch.Tensor:
    weights = random_weights("2.1", job.vae, VAE_DIM)
    vae = VAEWeights("tiny", vae_shapes("2.1", job.vae, VAE_DIM), lambda: weights)
    generator = torch.Generator().manual_seed(0)
    if job.vae == "decoder":
        latent = torch.randn(1, 16, 5, 8, 8, generator=generator)
        return decode(pool, vae, latent, "fp32", PIECES, poll).frames
    return encode(pool, vae, torch.rand(21, 64, 64, 3, generator=generator), "fp32", PIECES, poll)
