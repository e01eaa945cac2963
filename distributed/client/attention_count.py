"""How many of a pool's last forwards were sparse, and how many were dense although sparse attention was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...wanvideo.base.attention_choice import AttentionChoice
from ..protocol.reports import AttentionUse


@dataclass(frozen=True)
class AttentionCount:
    """The forwards since the settings of attention last changed.

    Args:
        last: what ran in the last one.
        sparse, dense: how many were sparse in some blocks, and how many were dense in all blocks.
    """

    last: AttentionUse
    sparse: int = 0
    dense: int = 0


class AttentionCounter:
    """Counts the forwards of one pool.

    Attributes:
        count_now: None where the last forward left attention to its model.
    """

    def __init__(self) -> None:
        self.count_now: AttentionCount | None = None
        self._asked: AttentionChoice | None = None

    def forget(self) -> None:
        """Forget all forwards."""
        self.count_now = self._asked = None

    def count(self, asked: AttentionChoice, use: AttentionUse | None) -> None:
        """Count one more forward, which was asked for like this."""
        if use is None:
            self.forget()
            return
        settings, was_sparse = replace(asked, sigma=None), use.sparse_blocks > 0
        before = self.count_now if settings == self._asked else None
        sparse, dense = (before.sparse, before.dense) if before is not None else (0, 0)
        self._asked, self.count_now = settings, AttentionCount(use, sparse + was_sparse, dense + (not was_sparse))
