"""A block's weights as one flat run of bytes, which is cut into equal shares, moved and gathered in one piece.

The idea is FSDP's FlatParameter (arXiv 2304.11277). `FlatBlock` says where each weight lies in the bytes.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..plan.placement import ALIGN, PlacementError
from ..shm import signs
from ..shm.signs import Mark

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
    """Bytes of all components of a weight."""
    return sum(tensor.nbytes for tensor in components(weight).values())


def on_meta(weight: Weight, dtype: torch.dtype | None = None) -> Weight:
    """A weight of the same kind without values, on the meta device; a plain tensor takes `dtype`."""
    metas = {
        key: torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
        for key, tensor in components(weight).items()
    }
    return with_components(weight, metas)


@dataclass(frozen=True)
class FlatPart:
    """Where one component of one weight lies in the bytes of a flat block: from `start` to `stop`."""

    name: str
    component: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def slices_in(self, start: int, stop: int) -> tuple[slice, slice]:
        """The piece of this part that lies in bytes [start, stop) of the block.

        Returns the piece's elements, as a slice of the flattened tensor, and its bytes, as a slice of those bytes.
        """
        first, last = max(start, self.start), min(stop, self.stop)
        elements = slice((first - self.start) // self.dtype.itemsize, (last - self.start) // self.dtype.itemsize)
        return elements, slice(first - start, last - start)


@dataclass(frozen=True)
class FlatBlock:
    """The order of a block's weights in one run of bytes.

    Args:
        parts: where each component of each weight lies.
        nbytes: bytes of the whole run, a multiple of the number of shares.
        metas: a weight of the same kind for each name, on the meta device.
    """

    parts: tuple[FlatPart, ...]
    nbytes: int
    metas: Mapping[str, Weight]

    @classmethod
    def of(cls, metas: Mapping[str, Weight], shares: int) -> FlatBlock:
        """Lay out weights of the kinds that `metas` has (see `on_meta`), so that `shares` divide the bytes."""
        parts, end = [], 0
        for name, weight in metas.items():
            for component, tensor in components(weight).items():
                stop = end + tensor.nbytes
                parts.append(FlatPart(name, component, tensor.dtype, tuple(tensor.shape), end, stop))
                end = -(-stop // ALIGN) * ALIGN
        unit = ALIGN * shares
        return cls(tuple(parts), -(-end // unit) * unit, metas)

    def holds(self, name: str, weight: Weight) -> bool:
        """Whether `weight` has the components, dtypes and shapes for which `name` has room in this block."""
        mine = [(part.component, part.dtype, part.shape) for part in self.parts if part.name == name]
        return mine == [(key, t.dtype, tuple(t.shape)) for key, t in components(weight).items()]

    def write(self, share: torch.Tensor, start: int, name: str, weight: Weight) -> None:
        """Write the piece of a weight that belongs into `share`, the block's bytes from `start` on, converting dtypes.

        The weight may be on any device. No other elements of the weight are read, so that those of a mapped file stay
        on the disk.
        """
        tensors = components(weight)
        for part in self.parts:
            if part.name != name or part.start >= start + len(share) or part.stop <= start:
                continue
            elements, inside = part.slices_in(start, start + len(share))
            share[inside].view(part.dtype).copy_(tensors[part.component].reshape(-1)[elements])

    def views(self, whole: torch.Tensor) -> dict[str, Weight]:
        """The weights by name as views into `whole`, all bytes of the block."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for part in self.parts:
            view = whole[part.start : part.stop].view(part.dtype).view(part.shape)
            tensors.setdefault(part.name, {})[part.component] = view
        return {name: with_components(self.metas[name], tensors[name]) for name in tensors}


class HostBuffer:
    """Bytes of host memory, page-locked where a GPU copies from them.

    Torch's pinned allocator is not used: it rounds every size up to a power of two.

    Attributes:
        bytes: uint8 [nbytes].

    Raises:
        PlacementError: CUDA does not lock so many bytes.
    """

    def __init__(self, nbytes: int, pin: bool):
        memory = mmap.mmap(-1, max(nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):  # locking a thousand pages is slower than one
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        if pin:
            address = self.bytes.data_ptr()
            with signs.marked(Mark.PAGE_LOCKING):
                code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
            if code:
                raise PlacementError(
                    f"CUDA could not lock {nbytes / 2**30:.1f} GiB of host memory (error {code}). "
                    "Raise the limit that `ulimit -l` shows, or free host memory."
                )
            weakref.finalize(self, _unregister, address, memory).atexit = False


def _unregister(address: int, _memory: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
