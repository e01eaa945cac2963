"""What a worker tells of itself: who it is, what it holds, how its models run. Reads its parts and changes none."""

from __future__ import annotations

import importlib.metadata
import os
import resource
from typing import TYPE_CHECKING

import torch

from ...wanvideo.checkpoint.weight_source import storage_format
from ...wanvideo.model import fp8_mode
from ..comm.topology import link_kind
from ..protocol.messages import Ready
from ..protocol.reports import ModelStatus, WorkerStatus
from ..protocol.specs import ModelSpec
from ..weights.models import LoadedModel

if TYPE_CHECKING:
    from .worker import Worker


def ready(worker: Worker) -> Ready:
    """The first message of a worker, once it has joined the others."""
    try:
        xfuser = importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError:
        xfuser = ""
    return Ready(worker.rank, os.getpid(), device_name(worker.device), torch.__version__, xfuser)


def worker_status(worker: Worker) -> WorkerStatus:
    """The memory and the models of a worker as they are now."""
    used, total = _device_memory(worker.device)
    return WorkerStatus(
        rank=worker.rank,
        pid=os.getpid(),
        device=device_name(worker.device),
        used=used,
        total=total,
        peak_private=worker.models.peak_private,
        fused=worker.fused,
        models=tuple(_model_status(worker, spec, loaded) for spec, loaded in worker.models.loaded.items()),
        link=link(worker),
        peak_allocated=worker.memory.peak_allocated,
        memory=worker.memory.last or worker.memory.use(*held_bytes(worker)),
        peak_reserved=worker.memory.peak_reserved,
        vae_bytes=worker.vaes.nbytes,
    )


def held_bytes(worker: Worker) -> tuple[int, int, int]:
    """Bytes on a worker's device: of weights, of keys and values that are kept between steps, and of peer memory."""
    weights = worker.models.memory.device_bytes + worker.vaes.nbytes
    peer_memory = sum(memory.nbytes for memory in worker.parallel.peer_memories.values())
    return weights, worker.runner.kept_bytes, peer_memory


def link(worker: Worker) -> str:
    """How a worker reaches the other ones (see topology.py)."""
    own = worker.locations[worker.rank]
    others = [at for rank, at in enumerate(worker.locations) if rank != worker.rank]
    return link_kind(worker.device, [at.device for at in others if at.host == own.host])


def out_of_memory(device: torch.device, error: torch.OutOfMemoryError) -> str:
    """What torch says of an allocation that failed, and what to do about it."""
    used, total = _device_memory(device)
    return (
        f"{device} ran out of memory ({used / 2**30:.1f} of {total / 2**30:.1f} GiB in use; "
        f"{str(error).splitlines()[0]}) "
        "Use fewer frames or a smaller size, lower max_sequence_length, or share the video among more GPUs."
    )


def _model_status(worker: Worker, spec: ModelSpec, loaded: LoadedModel) -> ModelStatus:
    parallel = worker.parallel
    plan = parallel.plan
    degrees = plan.sequence_degrees(loaded.model.config.num_heads)
    return ModelStatus(
        name=spec.name,
        weight_dtype=storage_format(loaded.source.header, spec.weight_dtype),
        compute_dtype=spec.compute_dtype,
        kernel=loaded.model.kernel.name,
        backend="xfuser" if parallel.settings.usp_backend == "xfuser" else "native",
        ulysses=degrees.ulysses,
        ring=degrees.ring,
        lora_uuid=loaded.uuid,
        tensor=plan.tensor_parallel,
        pipeline=plan.pipeline_parallel,
        placement=loaded.placement.reason,
        device_bytes=loaded.device_bytes,
        host_bytes=loaded.blocks.host_bytes,
        fp8=fp8_mode.describe(loaded.model, spec.fp8_mode, worker.device),
        overlapped=degrees in parallel.peer_memories,
        moved_in=loaded.blocks.mover.moved_in,
        moved_out=loaded.blocks.mover.moved_out,
    )


def device_name(device: torch.device) -> str:
    """The name of a device, which all devices of its kind have."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use and in all; on a CPU, of this process and of the host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, pages * size
