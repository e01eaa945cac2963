"""Where the blocks of a loaded model live, and how each is whole on the device when its turn comes.

Three places, chosen in placement.py and mixed freely: on the device, whole; a share of each block on each rank that
runs with the same weights; in host memory (page-locked beside a GPU). Blocks that are not whole on the device pass
through two buffers: while one block computes, the next is gathered from the ranks (as ZeRO-3 and FSDP do, arXiv
1910.02054 and 2304.11277) or copied from host memory, on a stream and in a process group of their own. Parameters are
views into those buffers, so the model runs as it is, and its result is bit for bit that of whole weights.

On a GPU a block is one allocation, in a segment of torch's allocator that nothing else shares (`release_cache`,
`SEGMENT`). Blocks of any model that leave make room for any other's, and never lie among activations: what fits by
its bytes fits.

Order of collectives: a rank starts its gathers in the order of the blocks, from `before_block` alone, which ranks of a
group reach alike (cancel.py lets all of them leave before it at the same block). `passes` waits for what is under way,
so a cancelled forward leaves nothing unmatched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..comm import timing
from ..plan.placement import SEGMENT, SLOTS, leaving_order
from .flat_block import HostBuffer, Layout, Weight, components, nbytes_of, on_meta, with_components

# torch 2.13 has another name for it and warns at the old one
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True)
class ShareGroup:
    """The ranks that keep one share of every block each; this rank keeps share `index`."""

    ranks: int = 1
    first_rank: int = 0
    index: int = 0
    group: dist.ProcessGroup | None = None


def gather_rows(row: Sequence[int], device: torch.device, world_size: int) -> list[list[int]]:
    """Every rank's `row` of numbers, by rank (a collective call of the whole world)."""
    if world_size == 1:
        return [list(row)]
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    rows = mine.new_empty(world_size * len(row))
    _all_gather(rows, mine)
    return rows.view(world_size, -1).tolist()


def join_share_group(groups: Sequence[Sequence[int]], rank: int) -> ShareGroup:
    """Make one process group for each of `groups` (a collective call of the whole world); the one of `rank`.

    Apart from the groups of attention, so that gathers and exchanges of activations pass each other.
    """
    mine = ShareGroup()
    for ranks in groups:
        options = None
        if dist.get_backend() == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = True  # else a gather waits for room beside the matrix products
        group = dist.new_group(list(ranks), pg_options=options)
        if rank in ranks:
            mine = ShareGroup(len(ranks), ranks[0], list(ranks).index(rank), group)
    return mine


def release_cache(device: torch.device) -> None:
    """Give what torch's allocator keeps for later back to the device, before something is allocated that stays.

    Else that could be cut from a segment which activations have left, and which then has no room for them.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def segment_bytes(nbytes: int, device: torch.device) -> int:
    """Bytes that `long_lived` takes on the device."""
    unit = unit_of(device)
    return -(-nbytes // unit) * unit


def unit_of(device: torch.device) -> int:
    """What a block on the device is rounded up to."""
    return 1 if device.type == "cpu" else SEGMENT


def long_lived(nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes on the device for a long time, in segments of torch's allocator that nothing else shares."""
    release_cache(device)
    return torch.empty(segment_bytes(nbytes, device), dtype=torch.uint8, device=device)[:nbytes]


class Slots:
    """The two whole blocks on the device that all models of a worker pass through, one model at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.serial = 0  # another one for other buffers
        self._buffers: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers)

    def get(self, nbytes: int) -> tuple[torch.Tensor, ...]:
        """Buffers of at least `nbytes` bytes each."""
        if not self._buffers or len(self._buffers[0]) < nbytes:
            self._buffers = ()
            self._buffers = tuple(long_lived(nbytes, self.device) for _ in range(SLOTS))
            self.serial += 1
        return self._buffers

    def release(self) -> None:
        """Forget the buffers; every `Residence` must have let go of them (`Residence.leave_slots`)."""
        self._buffers = ()


@dataclass
class _Block:
    """One block's bytes: this rank's share, or all, on the device or in host memory.

    On a CPU a block that was never moved has no `layout`: its weights are tensors of their own, or a mapped file's.
    """

    names: list[str]
    size: int = 0  # bytes that this rank's part takes on the device
    whole: dict[str, Weight] | None = None  # the weights, where all of them are on the device
    layout: Layout | None = None
    device: torch.Tensor | None = None
    host: HostBuffer | None = None
    slot: int | None = None  # in which the parameters point
    views: dict[int, dict[str, Weight]] = field(default_factory=dict)  # by slot


class Residence:
    """The blocks of one model on this rank.

    Args:
        names: of all weights; those of blocks are managed, the others are the caller's.
        read: gives a weight, on any device, and the dtype in which a plain one is to be held (None: its own). Only what
            this rank keeps of it is used, so it may be a view into a mapped file.
        assign: sets a weight of the model by name.
        group: the ranks that share every block; alone, they are whole.
        number_of: gives the number of the block that a weight belongs to; None for one of no block.
        order: the numbers of the blocks, in the order in which they run.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], tuple[Weight, torch.dtype | None]],
        assign: Callable[[str, Weight], None],
        device: torch.device,
        slots: Slots,
        group: ShareGroup | None = None,
        *,
        number_of: Callable[[str], int | None],
        order: Sequence[int],
    ):
        self.read, self.assign, self.device = read, assign, device
        self.group, self.slots = group or ShareGroup(), slots
        self._number_of = number_of
        self._blocks = {number: _Block([]) for number in order}
        for name in names:
            if (number := number_of(name)) is not None:
                self._blocks[number].names.append(name)
        self._to_host = leaving_order(self.blocks)
        self._serial = slots.serial
        self._order: list[int] = []  # blocks that pass through the slots in this forward
        self._reached = self._started = self._total = 0
        self._arrivals: dict[int, torch.cuda.Event | dist.Work | None] = {}
        self.moved_in = self.moved_out = 0  # bytes copied from host memory and to it

    # What is where.

    @property
    def blocks(self) -> list[int]:
        """The blocks in the order in which they run."""
        return list(self._blocks)

    @property
    def on_device(self) -> list[int]:
        """Blocks whose bytes of this rank are on the device."""
        return [i for i, block in self._blocks.items() if block.whole is not None or block.device is not None]

    @property
    def device_bytes(self) -> int:
        """Bytes of blocks on the device, the slots not counted."""
        return sum(self.bytes_of(i) for i in self.on_device)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that this model's blocks take, copies of what is on the device included."""
        return sum(len(block.host.bytes) for block in self._blocks.values() if block.host is not None)

    def bytes_of(self, index: int) -> int:
        """Bytes of this rank's part of a block."""
        return self._blocks[index].size

    def owns(self, name: str) -> bool:
        """Whether a weight belongs to a block."""
        return self._number_of(name) is not None

    def whole(self, name: str) -> tuple[Weight | None, bool]:
        """A block's weight if it is whole on the device and stays there, and whether a later one will be written into
        its very memory."""
        block = self._blocks.get(self._number_of(name))
        if block is None or block.whole is None:
            return None, False
        return block.whole[name], block.layout is not None

    # Filling.

    def load(self, resident: int, progress: Callable[[], None] = lambda: None) -> None:
        """Read this rank's bytes of every block, the first time; `resident` of them go to the device."""
        hosted = set(self._to_host[: len(self._blocks) - resident])
        for index in self.blocks:
            self._read_block(index, index in hosted)
            progress()

    def _read_block(self, index: int, to_host: bool) -> None:
        block = self._blocks[index]
        if self.group.ranks == 1 and not to_host and self.device.type == "cpu":
            block.whole = {name: self._moved(*self.read(name)) for name in block.names}
            block.size = sum(nbytes_of(weight) for weight in block.whole.values())
            self._bind(block.whole)
            return
        weights = {name: self.read(name) for name in block.names}
        layout = Layout.of({name: on_meta(*weight) for name, weight in weights.items()}, self.group.ranks)
        self._lay_out(block, layout, to_host)
        for name, (weight, _) in weights.items():
            self._write(block, name, weight)
        self._point(block)

    def _moved(self, weight: Weight, dtype: torch.dtype | None) -> Weight:
        moved = {key: tensor.to(self.device, dtype or tensor.dtype) for key, tensor in components(weight).items()}
        return with_components(weight, moved)

    def update(self, names: Iterable[str], weight_of: Callable[[str], Weight]) -> None:
        """Set weights anew, in blocks or not; `weight_of` gives each in the form in which it is to be held.

        A weight of another kind than before (a quantised one that a LoRA has changed) gives its block a new layout,
        and then `weight_of` is asked for every weight of the block.
        """
        of_block: dict[int, list[str]] = {}
        for name in names:
            if (number := self._number_of(name)) is not None:
                of_block.setdefault(number, []).append(name)
            else:
                self.assign(name, weight_of(name))
        for index, group in of_block.items():
            self._update_block(self._blocks[index], group, weight_of)

    def _update_block(self, block: _Block, names: Sequence[str], weight_of: Callable[[str], Weight]) -> None:
        for name in names:
            weight = weight_of(name)
            if block.layout is None:
                self._replace(block, name, weight)
            elif block.layout.holds(name, weight):
                self._write(block, name, weight)
            else:
                self._lay_out_anew(block, weight_of)
                return

    def _replace(self, block: _Block, name: str, weight: Weight) -> None:
        block.size += nbytes_of(weight) - nbytes_of(block.whole[name])
        block.whole[name] = weight
        self.assign(name, weight)

    def _lay_out_anew(self, block: _Block, weight_of: Callable[[str], Weight]) -> None:
        to_host = block.device is None
        block.device = block.host = None
        self._unbind(block)  # so that the old bytes are free before the new ones come
        weights = {name: weight_of(name) for name in block.names}
        self._lay_out(block, Layout.of({name: on_meta(w) for name, w in weights.items()}, self.group.ranks), to_host)
        for name, weight in weights.items():
            self._write(block, name, weight)
        self._point(block)

    def _lay_out(self, block: _Block, layout: Layout, to_host: bool) -> None:
        nbytes = layout.nbytes // self.group.ranks
        block.layout, block.device, block.host, block.size = layout, None, None, segment_bytes(nbytes, self.device)
        if to_host:
            block.host = self._host_buffer(nbytes)
        else:
            block.device = long_lived(nbytes, self.device)

    def _write(self, block: _Block, name: str, weight: Weight) -> None:
        start = block.layout.nbytes // self.group.ranks * self.group.index
        if block.device is not None:
            block.layout.write(block.device, start, name, weight)
            block.host = None  # out of date
        else:
            block.layout.write(block.host.bytes, start, name, weight)

    def _host_buffer(self, nbytes: int) -> HostBuffer:
        return HostBuffer(nbytes, pin=self.device.type == "cuda")

    # Moving between the device and host memory. Nothing here is collective.

    def step_out(self, nbytes: float) -> int:
        """Move blocks to host memory until `nbytes` have left the device, or all; returns how many did.

        A block that was there before, and has not changed since, needs no copy: host memory keeps its bytes.
        """
        leaving = self._leaving(nbytes)
        for index in leaving:
            self._leave_device(self._blocks[index])
        return sum(self.bytes_of(index) for index in leaving)

    def bytes_beyond(self, count: int) -> int:
        """Bytes that leave the device if `count` blocks stay there."""
        present = set(self.on_device)
        leaving = [index for index in self._to_host if index in present][: max(0, len(present) - count)]
        return sum(self.bytes_of(index) for index in leaving)

    def bytes_of_staying(self, count: int) -> int:
        """Bytes of the `count` blocks that stay on the device longest, wherever they are now."""
        return sum(self.bytes_of(index) for index in self._to_host[max(0, len(self._blocks) - count) :])

    def host_bytes_for(self, nbytes: float) -> int:
        """Bytes of host memory that `step_out(nbytes)` would take anew."""
        return sum(self.bytes_of(index) for index in self._leaving(nbytes) if self._blocks[index].host is None)

    def _leaving(self, nbytes: float) -> list[int]:
        leaving, present = [], set(self.on_device)
        for index in self._to_host:
            if nbytes <= 0:
                break
            if index in present:
                leaving.append(index)
                nbytes -= self.bytes_of(index)
        return leaving

    def step_in(self, count: int) -> None:
        """Bring blocks back from host memory until `count` are on the device."""
        present = set(self.on_device)
        entering = [index for index in reversed(self._to_host) if index not in present][: max(0, count - len(present))]
        if not entering:
            return
        for index in entering:
            self._enter_device(self._blocks[index])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies in host memory may be dropped from now on

    def _leave_device(self, block: _Block) -> None:
        if block.host is None:
            if block.layout is None:
                block.layout = Layout.of({name: on_meta(weight) for name, weight in block.whole.items()}, shares=1)
                block.host = self._host_buffer(block.layout.nbytes)
                for name, weight in block.whole.items():
                    block.layout.write(block.host.bytes, 0, name, weight)
            else:
                block.host = self._host_buffer(len(block.device))
                block.host.bytes.copy_(block.device)
            self.moved_out += len(block.host.bytes)
            block.size = segment_bytes(len(block.host.bytes), self.device)
        block.device = None
        self._unbind(block)

    def _enter_device(self, block: _Block) -> None:
        block.device = long_lived(len(block.host.bytes), self.device)
        block.device.copy_(block.host.bytes, non_blocking=True)
        self.moved_in += len(block.host.bytes)
        self._point(block)

    def _point(self, block: _Block) -> None:
        """Let the parameters point at the block's weights if all are on the device, else nowhere."""
        self._unbind(block)
        if self.group.ranks == 1 and block.device is not None:
            block.whole = block.layout.views(block.device)
            self._bind(block.whole)

    # A forward.

    @contextmanager
    def passes(self, count: int) -> Iterator[None]:
        """A forward that runs the blocks `count` times, each with `before_block` ahead of it, in their order.

        Leaving it, also by an exception, waits for what is under way.
        """
        self._begin(count)
        try:
            yield
        finally:
            self._end()

    def _begin(self, count: int) -> None:
        self._order = [i for i, block in self._blocks.items() if block.whole is None]
        self._reached = self._started = 0
        self._total = count * len(self._order)
        if self._order:
            self.slots.get(max(self._blocks[i].layout.nbytes for i in self._order))
            if self._serial != self.slots.serial:
                self._serial = self.slots.serial
                for index in self._order:
                    self._unbind(self._blocks[index])
        self._start_until(SLOTS)

    def before_block(self, index: int) -> None:
        """Have block `index` whole on the device (on its stream), and the next one under way."""
        block = self._blocks[index]
        if block.whole is not None:
            self._start_until(self._reached + SLOTS)
            return
        turn = self._reached
        self._start_until(turn + 1)
        self._await(turn)
        slot = turn % SLOTS
        if block.slot != slot:
            self._bind(self._views(block, slot))
            block.slot = slot
        # what came before has been launched, so its buffer is free once that has run
        self._start_until(turn + SLOTS)
        self._reached = turn + 1

    def _end(self) -> None:
        for turn in sorted(self._arrivals):
            self._await(turn)
        if self.slots.stream is not None:
            self.slots.stream.synchronize()

    def leave_slots(self) -> None:
        """Let the parameters point nowhere, so that the slots can be released."""
        for block in self._blocks.values():
            if block.slot is not None:
                self._unbind(block)

    def _views(self, block: _Block, slot: int) -> dict[str, Weight]:
        if slot not in block.views:
            buffer = self.slots.get(block.layout.nbytes)[slot]
            block.views[slot] = block.layout.views(buffer[: block.layout.nbytes])
        return block.views[slot]

    def _bind(self, weights: dict[str, Weight]) -> None:
        for name, weight in weights.items():
            self.assign(name, weight)

    def _unbind(self, block: _Block) -> None:
        """Let the block's parameters point nowhere, until its next turn."""
        block.whole = block.slot = None
        block.views.clear()
        self._bind(block.layout.models)

    def _start_until(self, turn: int) -> None:
        while self._started < min(turn, self._total):
            block = self._blocks[self._order[self._started % len(self._order)]]
            buffer = self.slots.get(block.layout.nbytes)[self._started % SLOTS]
            self._arrivals[self._started] = self._start(block, buffer[: block.layout.nbytes])
            self._started += 1

    def _start(self, block: _Block, whole: torch.Tensor) -> torch.cuda.Event | dist.Work | None:
        """Begin to fill `whole`; what to wait for."""
        if self.slots.stream is None:
            return self._fill(block, whole, waits=False)
        free = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.slots.stream):
            self.slots.stream.wait_event(free)
            self._fill(block, whole, waits=True)
            return self.slots.stream.record_event()

    def _fill(self, block: _Block, whole: torch.Tensor, waits: bool) -> dist.Work | None:
        size = block.layout.nbytes // self.group.ranks
        share = whole[size * self.group.index : size * (self.group.index + 1)]
        if block.device is None:
            share.copy_(block.host.bytes, non_blocking=True)
            self.moved_in += len(block.host.bytes)
        if self.group.ranks == 1:
            return None
        source = share if block.device is None else block.device
        return _all_gather(whole, source, group=self.group.group, async_op=not waits)

    def _await(self, turn: int) -> None:
        arrival = self._arrivals.pop(turn)
        with timing.standing(timing.WEIGHTS, self.group.group):
            if isinstance(arrival, torch.cuda.Event):
                torch.cuda.current_stream(self.device).wait_event(arrival)
            elif arrival is not None:
                arrival.wait()
