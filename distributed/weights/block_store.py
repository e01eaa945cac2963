"""The blocks of one model on one rank: read from the file, kept in one of their states, and changed by LoRAs.

offload.py decides which blocks go to host memory, and when. prefetch.py lets every block be whole on the device when it
computes. Nothing here is a collective call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..comm.collectives import ShareGroup
from ..plan.placement import leaving_order
from ..shm.host import HostShare
from .block_states import (
    Block,
    BlockMover,
    BlockParameters,
    HostBlock,
    LooseBlock,
    SharedBlock,
    StreamedBlock,
    WholeBlock,
    host_bytes_of,
    loose_block,
)
from .flat_block import FlatBlock, Weight, components, nbytes_of, on_meta, with_components


class BlockStore:
    """The blocks of one model on one rank, in whichever states they are.

    Args:
        names: of all weights of the model; the weights of blocks are managed here, the others are the caller's.
        read: gives a weight, on any device, and the dtype in which a plain one is to be held (None: the dtype that the
            weight has). Only this rank's part of the weight is used, so it may be a view into a mapped file.
        assign: sets a weight of the model by name.
        group: the ranks that share every block; alone, blocks are whole.
        number_of: gives the number of the block that a weight belongs to; None for a weight of no block.
        order: the numbers of the blocks, in the order in which they run.

    Attributes:
        states: each block as it is, by number; none before `load`.
        streamed: the blocks that are not whole on the device, by number, in the order in which they run.
        parameters: the model's parameters of each block, by number, in the order in which the blocks run.
        to_host_order: numbers of the blocks in the order in which they leave the device.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], tuple[Weight, torch.dtype | None]],
        assign: Callable[[str, Weight], None],
        device: torch.device,
        group: ShareGroup | None = None,
        *,
        number_of: Callable[[str], int | None],
        order: Sequence[int],
    ):
        self.device, self.group = device, group or ShareGroup()
        self.mover = BlockMover(device, self.group)
        self._read, self._assign, self._number_of = read, assign, number_of
        self.states: dict[int, Block] = {}
        self.streamed: dict[int, StreamedBlock] = {}
        self.parameters = {number: BlockParameters(assign) for number in order}
        for name in names:
            if (number := number_of(name)) is not None:
                self.parameters[number].names.append(name)
        self.to_host_order = leaving_order(self.numbers)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the blocks, in the order in which they run."""
        return list(self.parameters)

    @property
    def on_device(self) -> list[int]:
        """Numbers of the blocks whose bytes of this rank are on the device, in the order in which they run."""
        states = self.states
        return [i for i in self.parameters if i in states and not isinstance(states[i], HostBlock)]

    @property
    def device_bytes(self) -> int:
        """Bytes of this rank's blocks on the device, the prefetch buffers not counted."""
        return sum(self.bytes_of(i) for i in self.on_device)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that this model's blocks take, copies of what is on the device included."""
        return host_bytes_of(list(self.states.values()))

    def bytes_of(self, number: int) -> int:
        """Bytes of the device that this rank's part of a block takes, or would take."""
        return self.states[number].size

    def owns(self, name: str) -> bool:
        """Whether a weight belongs to a block."""
        return self._number_of(name) is not None

    def resident_weight(self, name: str) -> tuple[Weight | None, bool]:
        """A weight of a block, if the whole weight is on the device and stays there, else None.

        The second value says whether `update` will write the next weight of this name into the same memory.
        """
        number = self._number_of(name)
        match None if number is None else self.states.get(number):
            case LooseBlock(weights=weights):
                return weights[name], False
            case WholeBlock(weights=weights):
                return weights[name], True
        return None, False

    # Filling.

    def load(self, resident: int, progress: Callable[[], None] = lambda: None) -> None:
        """Read this rank's part of every block, the first time; `resident` of the blocks go to the device.

        Args:
            progress: called after each block.
        """
        hosted = set(self.to_host_order[: len(self.parameters) - resident])
        for number in self.parameters:
            self._load_block(number, number in hosted)
            progress()

    def _load_block(self, number: int, in_host_memory: bool) -> None:
        names = self.parameters[number].names
        if self.group.ranks == 1 and not in_host_memory and self.device.type == "cpu":
            self._put(number, loose_block({name: self._moved(*self._read(name)) for name in names}))
            return
        read = {name: self._read(name) for name in names}
        flat = FlatBlock.of({name: on_meta(*weight) for name, weight in read.items()}, self.group.ranks)
        block = self.mover.allocate(flat, in_host_memory)
        self.mover.fill(block, {name: weight for name, (weight, _) in read.items()})
        self._put(number, block)

    def _moved(self, weight: Weight, dtype: torch.dtype | None) -> Weight:
        moved = {key: tensor.to(self.device, dtype or tensor.dtype) for key, tensor in components(weight).items()}
        return with_components(weight, moved)

    def _put(self, number: int, block: Block) -> None:
        """Keep a block in place of its earlier state, and set the model's parameters to its weights."""
        self.states[number] = block
        states = ((i, self.states.get(i)) for i in self.parameters)
        self.streamed = {i: state for i, state in states if isinstance(state, SharedBlock | HostBlock)}
        match block:
            case LooseBlock() | WholeBlock():
                self.parameters[number].point_at(block.weights)
            case _:
                self.parameters[number].point_at(block.flat.metas)

    # Changing.

    def update(self, names: Iterable[str], weight_of: Callable[[str], Weight], host: HostShare) -> None:
        """Set weights anew, in blocks or not.

        A weight of another kind than before (a quantised one that a LoRA has changed) gives its block a new layout,
        and `weight_of` is then called for every weight of the block.

        Args:
            weight_of: gives each weight in the form in which it is to be held.
            host: what this rank may take of host memory where a block there grows.

        Raises:
            PlacementError: a block in host memory has grown beyond the bytes that `host` allows.
        """
        of_block: dict[int, list[str]] = {}
        for name in names:
            if (number := self._number_of(name)) is not None:
                of_block.setdefault(number, []).append(name)
            else:
                self._assign(name, weight_of(name))
        for number, group in of_block.items():
            if not all(self._write(number, name, weight_of(name)) for name in group):
                self._lay_out_anew(number, weight_of, host)

    def _write(self, number: int, name: str, weight: Weight) -> bool:
        """Write one weight into its block; False where the block has no room for one of this kind."""
        block = self.states[number]
        if isinstance(block, LooseBlock):
            block.size += nbytes_of(weight) - nbytes_of(block.weights[name])
            block.weights[name] = weight
            self._assign(name, weight)
        elif block.flat.holds(name, weight):
            self.mover.fill(block, {name: weight})
        else:
            return False
        return True

    def _lay_out_anew(self, number: int, weight_of: Callable[[str], Weight], host: HostShare) -> None:
        was_in_host_memory, before = self._let_go(number)
        weights = {name: weight_of(name) for name in self.parameters[number].names}
        flat = FlatBlock.of({name: on_meta(weight) for name, weight in weights.items()}, self.group.ranks)
        if was_in_host_memory:
            host.take(self.mover.share_bytes(flat) - before)
        block = self.mover.allocate(flat, was_in_host_memory)
        self.mover.fill(block, weights)
        self._put(number, block)

    def _let_go(self, number: int) -> tuple[bool, int]:
        """Free a block's bytes before new bytes are allocated.

        Returns whether the freed bytes lay in host memory, and how many bytes of host memory were freed.
        """
        block = self.states.pop(number)
        self.streamed.pop(number, None)
        if not isinstance(block, LooseBlock):
            self.parameters[number].point_at(block.flat.metas)
        return isinstance(block, HostBlock), host_bytes_of([block])

    # Moving.

    def offload(self, number: int) -> None:
        """Move a block from the device to host memory."""
        block = self.states[number]
        if not isinstance(block, HostBlock):
            self._put(number, self.mover.to_host(block))

    def onload(self, number: int) -> None:
        """Start to move a block from host memory to the device."""
        block = self.states[number]
        if isinstance(block, HostBlock):
            self._put(number, self.mover.to_device(block))

    def detach(self, number: int) -> None:
        """Let the parameters of a block that passes through the prefetch buffers point nowhere."""
        block = self.states[number]
        if isinstance(block, SharedBlock | HostBlock):
            self.parameters[number].point_at(block.flat.metas)
