"""Keys and values that the blocks computed from a text and a start image, kept while this text and image come again.

Keys and values of a text depend on neither the video nor the step: only the first step of a run computes them, and only
the first of the patches that pass through a pipeline. Each rank that shares a sequence needs all of them, so keeping
them saves more time, the more GPUs share the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

MOST = 4
"""How many texts are kept: both branches of cfg, and as many again for prompts by region or of a schedule."""

Keys = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, L, heads, head_dim] of the text, and of the image where a block attends to one."""


@dataclass(frozen=True, eq=False)
class _Kept:
    text: torch.Tensor
    image: torch.Tensor | None
    nbytes: int
    keys: dict[nn.Module, Keys] = field(default_factory=dict)

    def is_of(self, text: torch.Tensor, image: torch.Tensor | None) -> bool:
        """Whether the keys are those of this text and image."""
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
        """Bytes of keys and values once all blocks have computed theirs."""
        return sum(kept.nbytes for kept in self._texts)

    def of(self, text: torch.Tensor, image: torch.Tensor | None, blocks: int) -> dict[nn.Module, Keys] | None:
        """The keys and values of a text and an image, by the attention module of each block. A module that is not there
        yet computes its own and adds them.

        Waits until the device has embedded the text and the image, which are compared with those kept.

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
