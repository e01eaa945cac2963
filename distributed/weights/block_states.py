"""The states of a block of weights on one rank, and how a block goes from one state to another.

A block is whole on the device (`LooseBlock`, `WholeBlock`), or this rank has a share of the block there
(`SharedBlock`), or its bytes, whole or a share, lie in host memory (`HostBlock`). On a GPU a block is one allocation,
in a segment of torch's allocator that nothing else shares (see `allocate_segment`): blocks that leave make room for
any other model's, and never lie among activations. So what fits by its bytes fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..comm.collectives import ShareGroup
from .device_memory import allocate_segment, segment_bytes
from .flat_block import FlatBlock, HostBuffer, Weight, nbytes_of, on_meta

NO_SLOT = -1
"""In place of the number of a prefetch buffer: the parameters of a block point into none of them."""


@dataclass(slots=True)
class LooseBlock:
    """A whole block whose weights are tensors of their own, or views into a mapped file.

    On a CPU every block is so until it is moved.
    """

    weights: dict[str, Weight]
    size: int


@dataclass(slots=True)
class WholeBlock:
    """A whole block on the device, in one allocation. `copy` is host memory's copy of the bytes, if there is one."""

    flat: FlatBlock
    data: torch.Tensor
    weights: dict[str, Weight]  # views into `data`
    size: int
    copy: HostBuffer | None = None


@dataclass(slots=True)
class SharedBlock:
    """This rank's share of a block, on the device. `copy` is host memory's copy of the bytes, if there is one."""

    flat: FlatBlock
    data: torch.Tensor
    size: int
    copy: HostBuffer | None = None


@dataclass(slots=True)
class HostBlock:
    """A block, or this rank's share of it, in host memory. `size` is what the bytes would take on the device."""

    flat: FlatBlock
    buffer: HostBuffer
    size: int


DeviceBlock = LooseBlock | WholeBlock | SharedBlock
StreamedBlock = SharedBlock | HostBlock
"""A block that is not whole on the device, and must pass through the prefetch buffers when its turn comes."""
Block = LooseBlock | WholeBlock | SharedBlock | HostBlock


class BlockParameters:
    """The model's parameters of one block, which are set to weights on the device, or to tensors without bytes.

    Attributes:
        names: of the block's weights.
        slot: the prefetch buffer that the parameters point into, or `NO_SLOT`.
        views: the weights as they lie in each prefetch buffer, by slot.
    """

    __slots__ = ("_assign", "names", "slot", "views")

    def __init__(self, assign: Callable[[str, Weight], None]):
        self._assign = assign
        self.names: list[str] = []
        self.slot = NO_SLOT
        self.views: dict[int, dict[str, Weight]] = {}

    def point_at(self, weights: Mapping[str, Weight]) -> None:
        """Set the parameters to `weights`, which are not in a prefetch buffer."""
        self.slot = NO_SLOT
        self.views.clear()
        for name, weight in weights.items():
            self._assign(name, weight)

    def point_into(self, slot: int) -> None:
        """Set the parameters to the views into the prefetch buffer number `slot`."""
        self.slot = slot
        for name, weight in self.views[slot].items():
            self._assign(name, weight)


class BlockMover:
    """Allocates, fills and moves the blocks of one model on one rank.

    Attributes:
        moved_in, moved_out: bytes of weights copied from host memory to the device, and to host memory.
    """

    def __init__(self, device: torch.device, group: ShareGroup):
        self.device, self.group = device, group
        self.moved_in = self.moved_out = 0

    def share_bytes(self, flat: FlatBlock) -> int:
        """Bytes of this rank's part of a block: a share, or all where no other rank shares."""
        return flat.nbytes // self.group.ranks

    def allocate(self, flat: FlatBlock, in_host_memory: bool) -> WholeBlock | SharedBlock | HostBlock:
        """Memory for this rank's part of a block, on the device or in host memory, not filled yet."""
        nbytes = self.share_bytes(flat)
        if in_host_memory:
            return HostBlock(flat, self._host_buffer(nbytes), segment_bytes(nbytes, self.device))
        return self._on_device(flat, allocate_segment(nbytes, self.device), None)

    def fill(self, block: WholeBlock | SharedBlock | HostBlock, weights: Mapping[str, Weight]) -> None:
        """Write weights of a block, each of the kind for which the block has room, into this rank's part of it."""
        start = self.share_bytes(block.flat) * self.group.index
        if isinstance(block, HostBlock):
            share = block.buffer.bytes
        else:
            share, block.copy = block.data, None  # host memory's copy is out of date
        for name, weight in weights.items():
            block.flat.write(share, start, name, weight)

    def to_host(self, block: DeviceBlock) -> HostBlock:
        """Move a block to host memory; it is copied unless `block.copy` is up to date. `block` must not be used
        again."""
        if isinstance(block, LooseBlock):
            flat = FlatBlock.of({name: on_meta(weight) for name, weight in block.weights.items()}, shares=1)
            buffer = self._host_buffer(flat.nbytes)
            for name, weight in block.weights.items():
                flat.write(buffer.bytes, 0, name, weight)
            self.moved_out += len(buffer.bytes)
        else:
            flat = block.flat
            if block.copy is not None:
                return HostBlock(flat, block.copy, block.size)
            buffer = self._host_buffer(len(block.data))
            buffer.bytes.copy_(block.data)
            self.moved_out += len(buffer.bytes)
        return HostBlock(flat, buffer, segment_bytes(len(buffer.bytes), self.device))

    def to_device(self, block: HostBlock) -> WholeBlock | SharedBlock:
        """Start to copy a block to the device. The bytes in host memory remain as the `copy` of the returned block."""
        data = allocate_segment(len(block.buffer.bytes), self.device)
        data.copy_(block.buffer.bytes, non_blocking=True)
        self.moved_in += len(block.buffer.bytes)
        return self._on_device(block.flat, data, block.buffer)

    def _on_device(self, flat: FlatBlock, data: torch.Tensor, copy: HostBuffer | None) -> WholeBlock | SharedBlock:
        size = segment_bytes(len(data), self.device)
        if self.group.ranks == 1:
            return WholeBlock(flat, data, flat.views(data), size, copy)
        return SharedBlock(flat, data, size, copy)

    def _host_buffer(self, nbytes: int) -> HostBuffer:
        return HostBuffer(nbytes, pin=self.device.type == "cuda")


def loose_block(weights: dict[str, Weight]) -> LooseBlock:
    """A block made of `weights`, which are not copied."""
    return LooseBlock(weights, sum(nbytes_of(weight) for weight in weights.values()))


def host_bytes_of(blocks: Sequence[Block]) -> int:
    """Bytes of host memory that blocks take, copies of what is on the device included."""
    total = 0
    for block in blocks:
        match block:
            case HostBlock():
                total += len(block.buffer.bytes)
            case WholeBlock() | SharedBlock() if block.copy is not None:
                total += len(block.copy.bytes)
    return total
