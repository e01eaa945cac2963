"""Keys and values that the blocks made of a text, and of a start image, kept while the same ones come again.

They depend on neither the video nor the step: of a run only the first step computes them, and of the patches that pass
through a pipeline only the first one. Each rank that shares a sequence needs all of them, so the more GPUs share it,
the more that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

MOST = 4
"""Texts at a time: both branches of cfg, and as many again for prompts by region or of a schedule."""

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
    """What blocks have computed of the last texts, the one used last at the end.

    Args:
        room: gives the bytes that may still be taken for it.
    """

    def __init__(self, room: Callable[[], int]):
        self._room = room
        self._texts: list[_Kept] = []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values once all blocks have computed theirs."""
        return sum(kept.nbytes for kept in self._texts)

    def of(self, text: torch.Tensor, image: torch.Tensor | None, blocks: int) -> dict[nn.Module, Keys] | None:
        """Where each block's attention finds or leaves those of this text [B, L, dim] and image, both embedded.

        None where there is no room. Waits until the device has embedded them.
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
        """Forget all, as where the weights change."""
        self._texts.clear()


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
