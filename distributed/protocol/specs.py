"""What a pool is made of, where its ranks live, and how a model is run: the descriptions by which everybody knows them.

Imports no torch: the launcher reads them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..plan.degrees import ParallelPlan

PIPELINE_MODES = ("exact", "pipefusion")


@dataclass(frozen=True)
class PoolSettings:
    """What a pool is made of. Pools with equal settings are one pool.

    Args:
        plan: degrees of parallelism.
        device: "cuda", "cpu", or "auto" (cuda where there is one).
        memory_fraction: share of each GPU's memory that a worker's tensors may take.
        usp_backend: "native" (torch.distributed), "xfuser", or "auto" (the one measured faster: native).
        overlap: exchange what an Ulysses group or a ring shares, and the sums of tensor-parallel ranks, during
            computation.
        pipeline_mode: one of `PIPELINE_MODES`. With "pipefusion" the client asks for forwards by the strategy of that
            name, which streams patches through the stages (see pipefusion.py).
        auto: sizes of the plan that are 1, and degrees that are 0, are chosen for the model and its video (see
            search.py).
        by_speed: GPUs of different kinds share a sequence after their measured speeds (see `planner.speeds_of`), which
            then are the plan's.
    """

    plan: ParallelPlan
    device: str = "auto"
    memory_fraction: float = 1.0
    usp_backend: str = "auto"
    overlap: bool = True
    pipeline_mode: str = "exact"
    auto: bool = False
    by_speed: bool = False


@dataclass(frozen=True)
class RankLocation:
    """Where a rank lives.

    Args:
        host: name of the machine, the same for ranks that share its memory; "" is the client's own.
        device: index of the rank's GPU among those that processes on this machine see; without a meaning on CPUs.
    """

    host: str
    device: int

    @property
    def is_here(self) -> bool:
        """Whether the rank lives on the client's own machine."""
        return not self.host


def on_one_host(num_gpus: int) -> tuple[RankLocation, ...]:
    """The locations, by rank, of ranks that live on one machine, each on the GPU of its own number."""
    return tuple(RankLocation("", index) for index in range(num_gpus))


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and how it is run; the workers know the model by it.

    Args:
        path: safetensors file, or `random:14b` (random weights of a released size, for benchmarks).
        weight_dtype: "fp32", "fp16", "bf16", "fp8_e4m3fn" or "fp8_e5m2", in which the matrices are held that the
            file has not quantised (see `wanvideo.checkpoint.weight_source.place`).
        compute_dtype: "fp32", "fp16" or "bf16", in which products and attention run.
        attention: kernel name, see `wanvideo.attention.kernels.get_kernel`.
        allow_flash, allow_sdpa: kinds of kernel that "auto" may choose.
        slice_tokens: tokens that feed-forward and cross-attention take at once; 0 takes all.
        max_batch: batch items that one forward takes at once.
        shard_weights: whether each rank keeps a share of every block, which all gather before its turn: "on", "off",
            or "auto" (where whole weights don't fit).
        offload: whether blocks lie in host memory and are copied to the GPU for their turn: "on" (all of them), "off",
            or "auto" (as many as don't fit otherwise).
        stamp: of the file's header (see `Header`): workers refuse a file with another one; "" takes any.
        fp8_mode: "disabled", or what runs in eight bits: "linear", "linear+attention" (see wanvideo/model/fp8_mode.py).
        module: file beside the model, of a VACE module or of InfiniteTalk's layers (see
            `wanvideo.checkpoint.vace_module`), or "".
    """

    path: str
    weight_dtype: str = "bf16"
    compute_dtype: str = "bf16"
    attention: str = "auto"
    allow_flash: bool = True
    allow_sdpa: bool = True
    slice_tokens: int = 0
    max_batch: int = 1
    stamp: str = ""
    shard_weights: str = "auto"
    offload: str = "auto"
    fp8_mode: str = "disabled"
    module: str = ""

    @property
    def name(self) -> str:
        """The file, or both, as a user knows them."""
        return " + ".join(Path(path).name for path in (self.path, self.module) if path)
