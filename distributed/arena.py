"""Tensors that the client and the workers of one host share without copying them through a pipe.

An arena is anonymous memory (`memfd`) of one process that others of the same user open through /proc. It has
no name on any disk: when its processes end, in whatever way, nothing is left behind.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections.abc import Iterable

import torch

from .messages import ArenaRef, TensorRef

_ALIGN = 64  # bytes; torch wants aligned storage
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
_DTYPES["int64"] = torch.int64


_serials = itertools.count()


class Arena:
    """The owner's side: allocate, write, read."""

    def __init__(self, nbytes: int):
        self.nbytes = max(nbytes, mmap.PAGESIZE)
        self._fd = os.memfd_create("wan-parallel")
        os.ftruncate(self._fd, self.nbytes)
        self._map = mmap.mmap(self._fd, self.nbytes)
        self._used = 0
        self._serial = next(_serials)

    @property
    def ref(self) -> ArenaRef:
        """How other processes of this user open it while this process lives."""
        return ArenaRef(f"/proc/{os.getpid()}/fd/{self._fd}", self.nbytes, self._serial)

    def reset(self) -> None:
        """Forget all tensors; their memory will be overwritten."""
        self._used = 0

    def allocate(self, dtype: torch.dtype, shape: Iterable[int]) -> TensorRef:
        """Reserve an uninitialised tensor."""
        ref = TensorRef(str(dtype).removeprefix("torch."), tuple(shape), self._used)
        nbytes = math.prod(ref.shape) * dtype.itemsize
        if ref.offset + nbytes > self.nbytes:
            raise MemoryError(f"The arena of {self.nbytes} bytes is full. Make it larger.")
        self._used += _aligned(nbytes)
        return ref

    def write(self, tensor: torch.Tensor) -> TensorRef:
        """Copy a tensor in, from any device."""
        ref = self.allocate(tensor.dtype, tensor.shape)
        self.view(ref).copy_(tensor)
        return ref

    def view(self, ref: TensorRef) -> torch.Tensor:
        """The tensor itself, not a copy."""
        return _view(self._map, ref)

    def close(self) -> None:
        """Give the memory back. Views must not be used afterwards."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ArenaReader:
    """A worker's side: opens arenas by their path and keeps the newest open."""

    def __init__(self) -> None:
        self._ref: ArenaRef | None = None
        self._map: mmap.mmap | None = None

    def view(self, arena: ArenaRef, tensor: TensorRef) -> torch.Tensor:
        """The tensor of another process, readable and writable."""
        if arena != self._ref:
            fd = os.open(arena.path, os.O_RDWR)
            try:
                self._map = mmap.mmap(fd, arena.nbytes)
            finally:
                os.close(fd)
            self._ref = arena
        return _view(self._map, tensor)


def needed(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of an arena that holds `tensors`."""
    return sum(_aligned(t.nbytes) for t in tensors)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _view(memory: mmap.mmap, ref: TensorRef) -> torch.Tensor:
    dtype, count = _DTYPES[ref.dtype], math.prod(ref.shape)
    if count == 0:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=ref.offset).view(ref.shape)
