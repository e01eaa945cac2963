"""Tensors that the client and the workers of one host share without copying them through a pipe.

An arena is anonymous memory (`memfd`) of one process that others of the same user open through /proc. It has
no name on any disk: when its processes end, in whatever way, nothing is left behind.
"""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..protocol.refs import ArenaRef, TensorRef
from . import signs
from .signs import Mark

log = logging.getLogger(__name__)

_ALIGN = 64  # bytes; torch wants aligned storage
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
_DTYPES["int64"] = torch.int64


_serials = itertools.count()


class Arena:
    """The owner's side: allocate, write, read.

    Args:
        pinned: page-lock the memory, so that GPUs copy from and to the arena at full speed, here and in the workers.
            Page-locking takes a second for each GiB, so it is for arenas that are used again and again.
    """

    def __init__(self, nbytes: int, pinned: bool = False):
        self.nbytes = max(nbytes, mmap.PAGESIZE)
        self._fd = os.memfd_create("wan-parallel")
        os.ftruncate(self._fd, self.nbytes)
        self._map = mmap.mmap(self._fd, self.nbytes)
        self._pin = _Pin(self._map) if pinned else None
        self._used = 0
        self._serial = next(_serials)

    @property
    def ref(self) -> ArenaRef:
        """How other processes of this user open the arena while this process lives."""
        return ArenaRef(f"/proc/{os.getpid()}/fd/{self._fd}", self.nbytes, self._serial, self.pinned)

    @property
    def pinned(self) -> bool:
        """Whether page-locking was asked for; a driver may have refused it."""
        return self._pin is not None

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
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            _copy_bytes(tensor.detach(), self._map, ref.offset)
        else:
            self.view(ref).copy_(tensor)
        return ref

    def view(self, ref: TensorRef) -> torch.Tensor:
        """The tensor `ref` as a view into the arena's memory, not a copy."""
        return _view(self._map, ref)

    def close(self) -> None:
        """Give the memory back. Views must not be used afterwards."""
        if self._pin is not None:
            self._pin.release()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MakeArena(Protocol):
    """Makes arenas, as `Arena` itself does."""

    def __call__(self, nbytes: int, pinned: bool = False) -> Arena:
        """An arena of at least `nbytes` bytes."""


class ReusedArena:
    """One arena for request after request, replaced by a larger one when a request needs more.

    Args:
        make: makes them.
    """

    def __init__(self, make: MakeArena = Arena) -> None:
        self._make = make
        self._arena: Arena | None = None

    def of(self, nbytes: int, pinned: bool = False) -> Arena:
        """An arena of at least `nbytes` bytes, without the tensors that lay in it. No request may be under way."""
        if self._arena is None or self._arena.nbytes < nbytes or self._arena.pinned < pinned:
            self.close()
            self._arena = self._make(nbytes, pinned)
        self._arena.reset()
        return self._arena

    def close(self) -> None:
        """Give the memory back."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None


class ArenaReader:
    """A worker's side: opens arenas by their path and keeps the newest open."""

    def __init__(self) -> None:
        self._opened: _OpenedArena | None = None  # None before the first

    def view(self, arena: ArenaRef, tensor: TensorRef) -> torch.Tensor:
        """A tensor of another process as a view into the memory of its arena, readable and writable."""
        opened = self._opened
        if opened is None or opened.ref != arena:
            opened = self._opened = self._open(arena)
        return _view(opened.memory, tensor)

    def _open(self, arena: ArenaRef) -> _OpenedArena:
        fd = os.open(arena.path, os.O_RDWR)
        try:
            memory = mmap.mmap(fd, arena.nbytes)
        finally:
            os.close(fd)
        if self._opened is not None and self._opened.pin is not None:
            self._opened.pin.release()
        return _OpenedArena(arena, memory, _Pin(memory) if arena.pinned else None)


@dataclass(frozen=True)
class _OpenedArena:
    """An arena of another process, mapped here. `pin` keeps the memory page-locked; None where it is not."""

    ref: ArenaRef
    memory: mmap.mmap
    pin: _Pin | None


class _Pin:
    """Shared memory page-locked for the GPUs' copy engines, until `release`."""

    def __init__(self, memory: mmap.mmap):
        self._address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        with signs.marked(Mark.PAGE_LOCKING):
            code = int(torch.cuda.cudart().cudaHostRegister(self._address, len(memory), 0))
        if code:
            log.info("The driver does not pin %d bytes of shared memory (%d); copies take longer.", len(memory), code)
            self._address = 0

    def release(self) -> None:
        """Unlock the memory."""
        if self._address:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._address = 0


def _copy_bytes(tensor: torch.Tensor, memory: mmap.mmap, offset: int) -> None:
    """Copy the bytes of a tensor into an arena on one thread.

    Torch's threads take ten times as long as one thread for a LoRA's many small tensors where other processes keep the
    processors busy.
    """
    memory[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().data


def needed(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes that an arena needs to hold `tensors`."""
    return sum(_aligned(t.nbytes) for t in tensors)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _view(memory: mmap.mmap, ref: TensorRef) -> torch.Tensor:
    dtype, count = _DTYPES[ref.dtype], math.prod(ref.shape)
    if count == 0:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=ref.offset).view(ref.shape)
