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
        settings = replace(asked, sigma=None)
        if use is None or settings != self._asked or self.count_now is None:
            self.count_now = None if use is None else AttentionCount(use)
        self._asked = settings
        if use is not None and self.count_now is not None:
            was_sparse = use.sparse_blocks > 0
            before = self.count_now
            self.count_now = AttentionCount(use, before.sparse + was_sparse, before.dense + (not was_sparse))
