"""A forward's further inputs on their way to the workers: most stay the same from step to step and are sent once."""

from __future__ import annotations

import torch

from ...wanvideo.base.conditioning import Conditioning
from ..protocol.refs import ConditioningRef, TensorRef
from ..shm.arena import Arena, MakeArena, needed


class SharedConditioning:
    """What the workers were given last, so that equal inputs need not be written again.

    A camera path of 81 frames at 720p has 460 million numbers, as many as 25 latents.

    Args:
        make_arena: makes the memory in which they travel.
    """

    def __init__(self, make_arena: MakeArena = Arena) -> None:
        self._make_arena = make_arena
        self._arena: Arena | None = None
        self._sent: dict[str, torch.Tensor] = {}
        self._refs: dict[str, TensorRef] = {}

    def share(self, conditioning: Conditioning, dtype: torch.dtype) -> ConditioningRef | None:
        """Where the workers find a conditioning; None for an empty one. No request may be under way.

        Args:
            dtype: in which its tensors travel.
        """
        if conditioning.empty:
            return None
        tensors = {name: _one_item(tensor).detach().to(dtype) for name, tensor in conditioning.tensors().items()}
        if not self._holds(tensors):
            self._write(tensors)
        arena = self._arena.ref if self._arena else None
        return ConditioningRef(arena, self._refs, conditioning.options)

    def close(self) -> None:
        """Give the memory back."""
        if self._arena is not None:
            self._arena.close()
        self._arena = None
        self._sent, self._refs = {}, {}

    def _holds(self, tensors: dict[str, torch.Tensor]) -> bool:
        if tensors.keys() != self._sent.keys():
            return False
        return all(_equal(tensor, self._sent[name]) for name, tensor in tensors.items())

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        self.close()
        if tensors:
            self._arena = arena = self._make_arena(needed(tensors.values()))
            self._refs = {name: arena.write(tensor) for name, tensor in tensors.items()}
            self._sent = {name: tensor.clone() for name, tensor in tensors.items()}


def _one_item(tensor: torch.Tensor) -> torch.Tensor:
    """The first batch item, where the others are the same, as those of both branches of cfg are."""
    same = all(torch.equal(item, tensor[0]) for item in tensor[1:])
    return tensor[:1] if same else tensor


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
