"""Where ranks keep the keys and values of other ranks' displaced patches, and which manager exchanges them.

The managers are `PatchParallelismCommManager` of MIT's distrifuser, `BufferManager` of this module, which behaves like
it, and copies through host memory (host_kv.py).
"""

from __future__ import annotations

import importlib.metadata
import math
from importlib import import_module
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..parallel.sequence_group import MissingPackage
from .fp8_codec import FP8, from_fp8, to_fp8

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
MANAGERS = ("auto", "host", "native", "official")
"""What a user may ask for: copies through host memory, or gathers with this module's or distrifuser's buffers."""

INSTALL_LINE = "pip install --no-deps git+https://github.com/mit-han-lab/distrifuser.git"


class Manager(Protocol):
    """Buffers of one shape on every rank, and their exchange while computation goes on.

    Every rank makes the same calls in the same order: `enqueue` in each step, and in the next step either `arrive`
    or `forget` before the next `enqueue`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on this rank's device."""

    def get_buffer_list(self, idx: int) -> list[torch.Tensor]:
        """The tensors of all ranks that have arrived as `idx`, by rank. The tensor of this rank may be missing."""

    def enqueue(self, idx: int, tensor: torch.Tensor) -> None:
        """Start to send this rank's tensor to the other ranks, as `idx`."""

    def arrive(self, idx: int) -> None:
        """Make the device wait for the tensors that were enqueued last as `idx`."""

    def forget(self, idx: int) -> None:
        """Do without what was enqueued last as `idx`."""

    def settle(self, everything: bool = False) -> None:
        """End a step. With `everything`, the tensors that the step enqueued need no more help of this rank."""

    def clear(self) -> None:
        """Wait for the tensors that are on their way, and drop all others."""


class GatherManager:
    """The exchange by asynchronous gathers, with the buffers of distrifuser's manager or of `BufferManager`.

    Args:
        buffers: a manager whose tensors are registered, and whose buffers are created.
    """

    def __init__(self, buffers: BufferManager):
        self.buffers = buffers
        self.get_buffer_list, self.enqueue, self.clear = buffers.get_buffer_list, buffers.enqueue, buffers.clear

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all ranks on this rank's device."""
        return sum(b.nbytes for idx in range(len(self.buffers.handles)) for b in self.get_buffer_list(idx))

    def arrive(self, idx: int) -> None:
        """Make the device wait for the gather that was started last as `idx`."""
        handle, self.buffers.handles[idx] = self.buffers.handles[idx], None
        if handle is not None:
            handle.wait()

    def forget(self, idx: int) -> None:
        """Do without what was enqueued last as `idx`."""
        self.arrive(idx)  # else the gather could write over the tensors that are enqueued next

    def settle(self, everything: bool = False) -> None:
        """Nothing to do: a gather goes on by itself."""


class BufferManager:
    """Registered tensors of every rank, each gathered from all ranks while computation goes on.

    It has the methods of distrifuser's PatchParallelismCommManager. A rank's tensor lies beside those of the
    others, so that one gather fills the place without another copy.

    Args:
        config: has `device`, `n_device_per_batch` (ranks), `split_idx()` (this rank's place) and `batch_group`, as
            distrifuser's DistriConfig.
    """

    def __init__(self, config: SimpleNamespace):
        self.config = config
        self.handles: list[dist.Work | None] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtype: torch.dtype | None = None
        self._buffers: list[torch.Tensor] = []

    def register_tensor(self, shape: tuple[int, ...], torch_dtype: torch.dtype) -> int:
        """Ask for a buffer; returns its index. All have one dtype."""
        if self._dtype not in (None, torch_dtype):
            raise ValueError(f"Buffers of {self._dtype} and {torch_dtype} cannot be mixed. Use a second manager.")
        self._dtype = torch_dtype
        self._shapes.append(tuple(shape))
        return len(self._shapes) - 1

    def create_buffer(self) -> None:
        """Allocate all that was registered."""
        self._buffers = [
            torch.empty(self.config.n_device_per_batch, math.prod(s), dtype=self._dtype, device=self.config.device)
            for s in self._shapes
        ]
        self.handles = [None] * len(self._shapes)

    def get_buffer_list(self, idx: int) -> list[torch.Tensor]:
        """The tensors of all ranks, by rank, as they lie in the buffer."""
        return list(self._buffers[idx].view(-1, *self._shapes[idx]).unbind())

    def enqueue(self, idx: int, tensor: torch.Tensor) -> None:
        """Start to send this rank's tensor to the others. They have it when `handles[idx]` is waited for."""
        buffer = self._buffers[idx]
        mine = buffer[self.config.split_idx()]
        mine.copy_(tensor.flatten())
        self.handles[idx] = _all_gather(buffer.view(-1), mine, group=self.config.batch_group, async_op=True)

    def clear(self) -> None:
        """Wait for every gather under way."""
        for idx, handle in enumerate(self.handles):
            if handle is not None:
                handle.wait()
                self.handles[idx] = None


def official_version() -> str:
    """The version of distrifuser, or "" where it is not installed."""
    try:
        return importlib.metadata.version("distrifuser")
    except importlib.metadata.PackageNotFoundError:
        return ""


def manager_name(wanted: str, device: torch.device) -> str:
    """The name of the manager that does the exchange, for one of `MANAGERS`; distrifuser's with its version.

    Host memory is the choice on GPUs: on 4 H200s a step takes less with it than with gathers, on NVLink and without,
    and GPUs hold next to nothing (benchmarks/LOG.md).

    Raises:
        MissingPackage: distrifuser's manager was asked for, and distrifuser is not installed.
    """
    version = official_version()
    if wanted == "official" and not version:
        raise MissingPackage(
            f"The official DistriFusion package is not installed. Run: {INSTALL_LINE}, or set manager to auto."
        )
    if wanted == "auto" and device.type == "cuda":
        return "host"
    if wanted == "official" or (wanted == "auto" and version):
        return f"distrifuser {version}"
    return "native" if wanted == "auto" else wanted


def make_buffers(
    name: str, rank: int, group_rank: int, ranks: int, device: torch.device, group: object
) -> BufferManager:
    """A manager without buffers: `BufferManager`, or distrifuser's with a configuration made by hand.

    Distrifuser's own DistriConfig would start another process group on NCCL and, where one exists, fall back to one
    rank.
    """
    fields = {
        "rank": rank,
        "device": device,
        "n_device_per_batch": ranks,
        "split_idx": lambda: group_rank,
        "batch_group": group,
        "comm_checkpoint": 1,  # one layer in each exchange, as the layers of a video are large
        "verbose": False,
    }
    if name == "native":
        return BufferManager(SimpleNamespace(**fields))
    utils = import_module("distrifuser.utils")
    config = object.__new__(utils.DistriConfig)
    config.__dict__.update(fields)
    return utils.PatchParallelismCommManager(config)


class Codec:
    """How keys and values [2, B, n, heads, d] of a patch lie in a buffer: patches padded to `length` tokens.

    Plain keys and values keep their dtype. In fp8 the buffer has bytes: all numbers, and behind them a float32 scale
    for each token and head.
    """

    def __init__(self, batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, fp8: bool):
        self.full = (2, batch, length, heads, head_dim)
        self.fp8, self.dtype = fp8, torch.uint8 if fp8 else dtype
        self._elements, self._vectors = math.prod(self.full), math.prod(self.full[:-1])
        self.shape = (self._elements + 4 * self._vectors,) if fp8 else self.full

    def encode(self, kv: torch.Tensor) -> torch.Tensor:
        """kv [2, B, n, heads, d] as a buffer of `shape` and `dtype`; what lies behind n tokens is undefined."""
        n = kv.shape[2]
        if not self.fp8:
            missing = self.full[2] - n
            return F.pad(kv, (0, 0, 0, 0, 0, missing)) if missing else kv
        buffer = torch.empty(self.shape, dtype=torch.uint8, device=kv.device)
        for part, small, scales in zip(kv.flatten(0, 1), *self._parts(buffer, n), strict=True):
            to_fp8(part.reshape(-1, part.shape[-1]), small, scales)
        return buffer

    def decode(self, buffer: torch.Tensor, out: torch.Tensor) -> None:
        """Write the first n tokens of a buffer into out [2, B, n, heads, d]."""
        n = out.shape[2]
        if not self.fp8:
            out.copy_(buffer[:, :, :n])
            return
        for part, small, scales in zip(out.flatten(0, 1), *self._parts(buffer, n), strict=True):
            from_fp8(small, scales, part.view(-1, part.shape[-1]))

    def _parts(self, buffer: torch.Tensor, n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The numbers [n * heads, d] and scales [n * heads] of the first n tokens, for each of 2 * B."""
        _, batch, length, heads, head_dim = self.full
        numbers = buffer[: self._elements].view(FP8).view(2 * batch, length * heads, head_dim)[:, : n * heads]
        scales = buffer[self._elements :].view(torch.float32).view(2 * batch, length * heads)[:, : n * heads]
        return list(numbers), list(scales)
