"""Where tensors of a request lie: they stay in an arena (arena.py), and messages say where."""

from __future__ import annotations

from dataclasses import dataclass

from ...wanvideo.base.options import Options


@dataclass(frozen=True)
class ArenaRef:
    """An arena of the client, as the workers open it."""

    path: str
    nbytes: int
    serial: int  # a later arena can have the same path
    pinned: bool = False  # worth pinning: it serves many requests


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies in an arena; `dtype` is torch's name for it, such as float32."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class LoraRef:
    """A `wanvideo.base.lora` delta, its tensors in an arena. `kind` is the class name there."""

    kind: str
    tensors: tuple[TensorRef, ...]
    scale: float = 1.0
    base_scale: float = 1.0


@dataclass(frozen=True)
class ConditioningRef:
    """A `wanvideo.base.conditioning.Conditioning`: its tensors by name, in an arena of their own that outlives a step.

    A tensor with one item where the latent has more is the same for all of them.
    """

    arena: ArenaRef | None
    tensors: dict[str, TensorRef]
    options: Options
