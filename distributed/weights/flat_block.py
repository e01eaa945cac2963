"""A block's weights as one run of bytes, which can be cut into equal shares, moved and gathered in one piece."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..plan.placement import ALIGN, PlacementError

Weight = Any
"""A tensor, or a quantised weight that offers `components()` and `replace(components)`."""

PLAIN = ""  # name of the one component of a plain tensor


def components(weight: Weight) -> dict[str, torch.Tensor]:
    """The tensors that a weight is made of."""
    return {PLAIN: weight} if isinstance(weight, torch.Tensor) else weight.components()


def with_components(weight: Weight, tensors: Mapping[str, torch.Tensor]) -> Weight:
    """A weight like `weight` that is made of other tensors."""
    return tensors[PLAIN] if isinstance(weight, torch.Tensor) else weight.replace(dict(tensors))


def nbytes_of(weight: Weight) -> int:
    """Bytes of all components."""
    return sum(tensor.nbytes for tensor in components(weight).values())


def on_meta(weight: Weight, dtype: torch.dtype | None = None) -> Weight:
    """A weight of the same kind without values, plain ones of `dtype`."""
    metas = {
        key: torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
        for key, tensor in components(weight).items()
    }
    return with_components(weight, metas)


@dataclass(frozen=True)
class Part:
    """Where one component of one weight lies."""

    name: str
    component: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def slice_of(self, start: int, stop: int) -> tuple[slice, slice]:
        """What a share [start, stop) holds of this part: elements of the flattened tensor, bytes of the share."""
        first, last = max(start, self.start), min(stop, self.stop)
        elements = slice((first - self.start) // self.dtype.itemsize, (last - self.start) // self.dtype.itemsize)
        return elements, slice(first - start, last - start)


@dataclass(frozen=True)
class Layout:
    """The order of a block's weights; `models` has a weight of the same kind for each, on the meta device."""

    parts: tuple[Part, ...]
    nbytes: int
    models: Mapping[str, Weight]

    @classmethod
    def of(cls, models: Mapping[str, Weight], shares: int) -> Layout:
        """Lay out weights like `models` (see `on_meta`), so that `shares` divide the bytes."""
        parts, end = [], 0
        for name, weight in models.items():
            for component, tensor in components(weight).items():
                stop = end + tensor.nbytes
                parts.append(Part(name, component, tensor.dtype, tuple(tensor.shape), end, stop))
                end = -(-stop // ALIGN) * ALIGN
        unit = ALIGN * shares
        return cls(tuple(parts), -(-end // unit) * unit, models)

    def holds(self, name: str, weight: Weight) -> bool:
        """Whether `weight` has the kind, dtypes and shapes that `name` has here."""
        mine = [(part.component, part.dtype, part.shape) for part in self.parts if part.name == name]
        return mine == [(key, t.dtype, tuple(t.shape)) for key, t in components(weight).items()]

    def write(self, share: torch.Tensor, start: int, name: str, weight: Weight) -> None:
        """Put into `share` (the bytes from `start` on) what belongs there of a weight, on any device, converted.

        Reads no other elements of it, so that those of a mapped file stay on the disk.
        """
        tensors = components(weight)
        for part in self.parts:
            if part.name != name or part.start >= start + len(share) or part.stop <= start:
                continue
            elements, place = part.slice_of(start, start + len(share))
            share[place].view(part.dtype).copy_(tensors[part.component].reshape(-1)[elements])

    def views(self, whole: torch.Tensor) -> dict[str, Weight]:
        """The weights as views into all bytes of the block."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for part in self.parts:
            view = whole[part.start : part.stop].view(part.dtype).view(part.shape)
            tensors.setdefault(part.name, {})[part.component] = view
        return {name: with_components(self.models[name], tensors[name]) for name in tensors}


class HostBuffer:
    """Bytes of host memory, page-locked where a GPU copies from them.

    Not torch's pinned allocator: it rounds every size up to a power of two.
    """

    def __init__(self, nbytes: int, pin: bool):
        memory = mmap.mmap(-1, max(nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):  # locking a thousand pages is slower than one
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        if pin:
            address = self.bytes.data_ptr()
            code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
            if code:
                raise PlacementError(
                    f"CUDA could not lock {nbytes / 2**30:.1f} GiB of host memory (error {code}). "
                    "Raise the limit that `ulimit -l` shows, or free host memory."
                )
            weakref.finalize(self, _unregister, address, memory).atexit = False


def _unregister(address: int, _memory: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
