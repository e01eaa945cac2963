"""Where a model's weights go: whole on each GPU, shared among them, or in host memory. Arithmetic only.

Every rank must come to the same answer about sharing, because gathering a block is a collective call: the ranks tell
each other their room first (see `Models.load`) and then all ask `choose_placement` with the same numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.user_error import UserError

SLOTS = 2
"""Whole blocks on the GPU while blocks are gathered or streamed: the one that computes and the one that arrives."""

SEGMENT = 2**21
"""Torch's GPU allocator rounds a large allocation up to a multiple of so many bytes. A block, or a share of a block, is
one large allocation."""
ALIGN = 256
"""Each weight starts at a multiple of so many bytes in its block, as an allocation of its own would in torch's GPU
allocator: the same kernels are then chosen."""

Item = TypeVar("Item")

CHOICES = ("auto", "on", "off")
REFERENCE_TOKENS = 21 * 30 * 52
"""Tokens of 81 frames at 480p, for a model that is loaded before its first video is known."""

# Bytes per token and channel: the residual stream and two float32 temporaries, then q, k, v, their exchanged copies,
# the attention output and what torch keeps between them. 14B at 480p and 720p takes 1 GPU 208 kB more a token, which
# is 40 bytes x 5120 (benchmarks/results/h200.jsonl).
_FLOAT32_BYTES, _COMPUTE_VALUES = 12, 14
_WORKSPACE = 2**27  # cuBLAS, cuDNN and the kernels' own


class PlacementError(UserError, ValueError):
    """The weights do not fit. The text says how much is missing, on which GPU, and what would help."""


@dataclass(frozen=True)
class Demand:
    """The bytes that a model takes of one GPU, by what they are for."""

    fixed: int  # embeddings, encoders and head, on every GPU
    block: int  # the largest block, whole
    blocks: int  # how many
    activations: int
    unit: int = 1  # what a part of a block is rounded up to
    sizes: tuple[int, ...] = ()  # of each block in the order in which they run, where they differ

    @property
    def whole(self) -> int:
        """Bytes of all weights."""
        return self.fixed + sum(self._sizes)

    @property
    def usual_block(self) -> int:
        """Bytes of a block on average."""
        return (self.whole - self.fixed) // max(1, self.blocks)

    def part(self, share: int) -> int:
        """Bytes of 1/share of the largest block."""
        return self._part(self.block, share)

    def parts(self, share: int, count: int) -> int:
        """Bytes of 1/share of each of the `count` blocks that stay on the GPU longest."""
        return self.growing(share)[count]

    def growing(self, share: int) -> list[int]:
        """A list of `parts(share, count)` for a `count` of 0, 1, 2 ... blocks."""
        staying = reversed(leaving_order(self._sizes))
        return list(accumulate((self._part(size, share) for size in staying), initial=0))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.sizes or (self.block,) * self.blocks

    def _part(self, nbytes: int, share: int) -> int:
        return -(-math.ceil(nbytes / share) // self.unit) * self.unit


def leaving_order(blocks: Sequence[Item]) -> list[Item]:
    """The blocks of a model in the order in which they leave a GPU that is too small.

    However many blocks leave, they are spread evenly over the model (van der Corput's sequence), so that each copy from
    host memory has the time of several blocks.
    """
    size = max(1, (len(blocks) - 1).bit_length())
    order = (int(format(i, f"0{size}b")[::-1], 2) for i in range(2**size))
    return [blocks[i] for i in order if i < len(blocks)]


def demand_of(sizes: Mapping[str, int], config: WanConfig, activations: int, unit: int = 1) -> Demand:
    """What a model, or a part of it, asks of a GPU.

    Args:
        sizes: bytes of each weight in the form in which it is held, by name.
        unit: bytes to a multiple of which a block is rounded up.
    """
    fixed, blocks = 0, dict[int, int]()
    for name, nbytes in sizes.items():
        if (number := config.block_number(name)) is not None:
            blocks[number] = blocks.get(number, 0) + -(-nbytes // ALIGN) * ALIGN
        else:
            fixed += nbytes
    in_order = tuple(blocks[number] for number in config.run_order(range(config.num_layers)) if number in blocks)
    return Demand(fixed, max(in_order, default=0), len(in_order), activations, unit, in_order)


@dataclass(frozen=True)
class Placement:
    """Where the blocks live.

    Args:
        share: ranks that keep 1/share of every block each; 1 is all of it on every rank.
        resident: blocks (or shares of them) that stay on the tightest GPU; the others lie in host memory.
        reason: why, for the log and the status.
    """

    share: int
    resident: int
    reason: str


def activation_bytes(
    config: WanConfig,
    tokens: int,
    batch: int,
    itemsize: int,
    slice_tokens: int,
    workspace: int = _WORKSPACE,
    contexts: int = 1,
) -> int:
    """Expected activation memory of one rank that runs `batch` items of `tokens` tokens each.

    Args:
        itemsize: bytes of the compute dtype.
        slice_tokens: as in `WanModel`; 0 takes all tokens through the feed-forward at once.
        contexts: control videos of a VACE model.
    """
    stream = tokens * config.dim * (_FLOAT32_BYTES + config.token_bytes(contexts) + _COMPUTE_VALUES * itemsize)
    hidden = min(tokens, slice_tokens or tokens) * config.ffn_dim * 2 * itemsize
    return batch * (stream + hidden) + workspace


def room_beside(room: Sequence[int], activations: Sequence[int]) -> list[int]:
    """The room of each GPU in bytes, larger by as much as its activations stay below the largest of `activations`.

    So the rooms can be compared with a demand that counts the largest activations for every GPU.
    """
    return [there + max(activations) - own for there, own in zip(room, activations, strict=True)]


def fitting_blocks(demand: Demand, room: int, share: int) -> int:
    """How many blocks (or shares of them) can stay on a GPU of `room` bytes; -1 where it cannot run at all."""
    left = room - demand.fixed - demand.activations
    if share == 1 and left >= demand.parts(1, demand.blocks):
        return demand.blocks
    left -= SLOTS * demand.part(1)
    return bisect_right(demand.growing(share), left) - 1


def needed_bytes(demand: Demand, share: int, resident: int) -> int:
    """Bytes of a GPU that runs the model with `resident` blocks (or shares of them) on it."""
    passing = SLOTS * demand.part(1) if share > 1 or resident < demand.blocks else 0
    return demand.fixed + demand.parts(share, resident) + passing + demand.activations


def choose_placement(
    demand: Demand,
    room: Sequence[int],
    ranks: int,
    shard: str = "auto",
    offload: str = "auto",
    host_room: int = 2**62,
    gpus: Sequence[int] = (),
) -> Placement:
    """Choose where the weights live: whole where they fit, else shared, else shared and partly in host memory.

    Args:
        demand: of the model on each rank.
        room: bytes that each GPU has for it.
        ranks: how many GPUs hold the same weights.
        shard, offload: "auto", "on" or "off" (see `ModelSpec`).
        host_room: bytes of host memory that all ranks together may take.
        gpus: the ranks whose GPUs they are, for a refusal; 0, 1 ... without.

    Raises:
        PlacementError: it does not fit.
    """
    tightest = min(room)
    shares = [1] if shard == "off" or ranks == 1 else [ranks] if shard == "on" else [1, ranks]
    gpus, why = gpus or range(len(room)), _why(demand, room)
    if offload == "on":
        return _in_host_memory(demand, room, shares[-1], 0, host_room, "offload is on", gpus)
    for share in shares:
        if fitting_blocks(demand, tightest, share) == demand.blocks:
            return Placement(
                share, demand.blocks, _where(demand, share, 0, "shard_weights is on" if shard == "on" else why)
            )
    if offload == "off":
        raise PlacementError(_refusal(demand, room, shares[-1], demand.blocks, shard, offload, ranks, gpus))
    resident = fitting_blocks(demand, tightest, shares[-1])
    return _in_host_memory(demand, room, shares[-1], resident, host_room, why, gpus)


def _in_host_memory(
    demand: Demand,
    room: Sequence[int],
    share: int,
    resident: int,
    host_room: int,
    why: str,
    gpus: Sequence[int],
) -> Placement:
    if fitting_blocks(demand, min(room), share) < 0:
        raise PlacementError(_refusal(demand, room, share, 0, "on", "on", share, gpus))
    hosted = demand.blocks - resident
    needed = (demand.parts(1, demand.blocks) - demand.parts(1, resident)) * len(room) // share
    if needed > host_room:
        raise PlacementError(
            f"{hosted} of {demand.blocks} blocks must lie in host memory, which takes {_gib(needed)} on "
            f"{len(room)} ranks, and {_gib(host_room)} are free. Close other programs, or use more or larger GPUs"
            f"{'' if share > 1 or len(room) == 1 else ', or set shard_weights to auto'}."
        )
    return Placement(share, resident, _where(demand, share, hosted, why))


def _where(demand: Demand, share: int, hosted: int, why: str) -> str:
    """Where the weights lie, in words. `why` is left out where every GPU has all weights."""
    if share == 1 and not hosted:
        return f"whole on each GPU, {_gib(demand.whole)}"
    shared = f"1/{share} of each block on each of {share} GPUs" if share > 1 else "whole blocks"
    streamed = f", {hosted} of {demand.blocks} blocks in host memory" if hosted else ""
    return f"{shared}{streamed} ({why})"


def _why(demand: Demand, room: Sequence[int]) -> str:
    return (
        f"{_gib(demand.whole)} of weights and {_gib(demand.activations)} of activations, "
        f"and the tightest GPU has {_gib(min(room))}"
    )


def _refusal(
    demand: Demand,
    room: Sequence[int],
    share: int,
    resident: int,
    shard: str,
    offload: str,
    ranks: int,
    gpus: Sequence[int],
) -> str:
    needed, least = needed_bytes(demand, share, resident), min(range(len(room)), key=lambda index: room[index])
    weights = needed - demand.activations
    ways = ["set offload to auto"] if offload == "off" else []
    ways += ["set shard_weights to auto"] if shard == "off" and ranks > 1 else []
    ways += ["use fewer frames or a smaller size", "raise gpu_memory_fraction", "use more GPUs"]
    return (
        f"The GPU of rank {gpus[least]} has {_gib(room[least])} for this model and needs {_gib(needed)} "
        f"({_gib(weights)} of weights, {_gib(demand.activations)} of activations): "
        f"{_gib(needed - room[least])} are missing. "
        f"{ways[0][0].upper()}{ways[0][1:]}, {', '.join(ways[1:-1])}, or {ways[-1]}."
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
