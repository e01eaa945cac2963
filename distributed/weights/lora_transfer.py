"""How LoRAs reach the workers: the client writes their tensors into an arena, and every worker reads them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...wanvideo.base.lora import Difference, LoraDelta, LowRank, Replacement
from ..protocol.refs import ArenaRef, LoraRef
from ..shm.arena import Arena, ArenaReader, needed


@dataclass(frozen=True)
class LoraSet:
    """The changes that LoRAs make to a model's weights.

    Args:
        uuid: different for different sets; the workers merge when the uuid changes. "" is the set without LoRAs.
        build: gives the deltas by weight name; only called when the workers need them.
    """

    uuid: str
    build: Callable[[], Mapping[str, Sequence[LoraDelta]]]


NO_LORAS = LoraSet("", dict)


def room_for(weights: Mapping[str, Sequence[LoraDelta]]) -> int:
    """Bytes of an arena that takes these deltas."""
    return needed(tensor for changes in weights.values() for change in changes for tensor in tensors_of(change))


def write_deltas(arena: Arena, weights: Mapping[str, Sequence[LoraDelta]]) -> dict[str, tuple[LoraRef, ...]]:
    """Copy the tensors of all deltas into an arena; returns where each delta lies, by weight name."""
    return {name: tuple(_write(arena, change) for change in changes) for name, changes in weights.items()}


def read_delta(reader: ArenaReader, arena: ArenaRef, ref: LoraRef) -> LoraDelta:
    """The delta at `ref`, whose tensors are views into the client's arena."""
    first, *others = (reader.view(arena, tensor) for tensor in ref.tensors)
    match ref.kind:
        case "LowRank":
            (down,) = others
            return LowRank(first, down, ref.scale, ref.base_scale)
        case "Difference":
            return Difference(first, ref.scale, ref.base_scale)
        case _:
            return Replacement(first)


def _write(arena: Arena, change: LoraDelta) -> LoraRef:
    refs = tuple(arena.write(tensor) for tensor in tensors_of(change))
    kind = type(change).__name__
    if isinstance(change, LowRank | Difference):
        return LoraRef(kind, refs, change.scale, change.base_scale)
    return LoraRef(kind, refs)


def tensors_of(change: LoraDelta) -> tuple[torch.Tensor, ...]:
    """The tensors that a delta is made of."""
    match change:
        case LowRank():
            return change.up, change.down
        case Difference():
            return (change.diff,)
        case _:
            return (change.weight,)
