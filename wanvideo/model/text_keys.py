"""A cache of the keys and values that the blocks compute from a text and a start image, for forwards with the same two.

Keys and values of a text depend on neither the video nor the step: only the first step of a run computes them, and only
the first of the patches that pass through a pipeline. Each rank that shares a sequence needs all keys and values, so
that the cache saves more time, the more GPUs share the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

MOST = 4
"""The number of texts in the cache: two branches of cfg, and two more for prompts by region or for a schedule."""

Keys = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, L, heads, head_dim] of the text, and of the image where a block attends to one."""


@dataclass(frozen=True, eq=False)
class _Kept:
    text: torch.Tensor
    image: torch.Tensor | None
    nbytes: int
    keys: dict[nn.Module, Keys] = field(default_factory=dict)

    def is_of(self, text: torch.Tensor, image: torch.Tensor | None) -> bool:
        """Whether the keys and values were computed from this text and this image."""
        return _same(self.text, text) and _same(self.image, image)


class TextKeys:
    """The keys and values of the last texts, in the order of their last use.

    Args:
        room: gives the bytes of the device that may still be taken for keys and values.
    """

    def __init__(self, room: Callable[[], int]):
        self._room = room
        self._texts: list[_Kept] = []

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values once every block has computed its own."""
        return sum(kept.nbytes for kept in self._texts)

    def of(self, text: torch.Tensor, image: torch.Tensor | None, blocks: int) -> dict[nn.Module, Keys] | None:
        """The keys and values of a text and an image, by the attention module of each block. An attention module that
        the dict lacks computes its keys and values and adds them.

        The call waits until the device has embedded text and image, as it compares both with those in the cache.

        Args:
            text, image: embedded, [B, L, dim]; a model without image tokens has no image.
            blocks: how many blocks will add keys and values.

        Returns:
            None where the device has no room for them.
        """
        kept = next((kept for kept in reversed(self._texts) if kept.is_of(text, image)), None)
        if kept is None:
            sources = [text] if image is None else [text, image]
            nbytes = 2 * blocks * sum(source.nbytes for source in sources)
            del self._texts[: max(0, len(self._texts) - MOST + 1)]
            if nbytes > self._room():
                return None
            kept = _Kept(text, image, nbytes)
        else:
            self._texts.remove(kept)
        self._texts.append(kept)
        return kept.keys

    def clear(self) -> None:
        """Forget all keys and values, as is needed when the weights change."""
        self._texts.clear()


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
