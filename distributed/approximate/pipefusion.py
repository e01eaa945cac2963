"""PipeFusion: the patches of a video streamed through pipeline stages, approximately (Fang et al., arXiv 2405.14430).

Whole items leave all but one of the stages idle while there is one item (see pipeline.py). Runs of tokens, called
patches here as there, fill them: patch after patch passes through all blocks. A stage keeps the keys and values of all
tokens for its own blocks. To a patch they are fresh where an earlier patch or itself has passed in this step, and of
the step before where a later one will. That is an approximation, good while two successive steps look alike, so the
first steps of a run, and some later ones, are exact and leave their keys and values behind.

With VACE a patch goes through the stages with its part of the control streams, whose self-attention in VACE's blocks
has kept keys and values like that of the video.

Patches are whole frames where there are enough, and rows of tokens else: width splits are known to tear.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ...wanvideo.attention.kernels import AttentionKernel
from ...wanvideo.base.grid import Grid
from ...wanvideo.model.layers import SelfAttention
from ...wanvideo.model.model import WanModel
from ..parallel.sequence import NativeAttention, SequenceGroup
from ..plan.degrees import bounds
from ..protocol.requests import Displaced
from ..weights.device_memory import release_cache
from .displaced import StaleError
from .schedule import STALE

PATCHES_PER_STAGE = 4
"""So n stages work 4n / (5n - 1) of the time on one item: 8/9 for 2 stages, 16/19 for 4."""


@dataclass(frozen=True)
class Stretch:
    """Tokens [start, stop) of a sequence that go through the blocks together, and their self-attention."""

    start: int
    stop: int
    attend: SelfAttention


def cut(grid: Grid, stages: int) -> list[tuple[int, int]]:
    """Start and stop of each patch in the order in which they go, in tokens; fewer than wanted where a video has fewer
    rows.

    What lies behind the video goes first, in runs no longer than the video's patches, so that these see it fresh.
    """
    wanted, unit = PATCHES_PER_STAGE * stages, grid.rows * grid.columns
    if grid.frames < wanted:
        unit = grid.columns
    units = grid.video_tokens // unit
    edges = [bounds(units, min(wanted, units), i) for i in range(min(wanted, units))]
    video = [(start * unit, stop * unit) for start, stop in edges]
    runs = math.ceil(grid.tail / (video[0][1] - video[0][0]))
    behind = (bounds(grid.tail, runs, i) for i in range(runs))
    return [*((grid.video_tokens + start, grid.video_tokens + stop) for start, stop in behind), *video]


class KeptKeys:
    """An attention kernel to the keys and values of all tokens, of which each call brings some up to date.

    Called block by block with tokens [start, start + n): q, k, v [B, n, heads, head_dim].
    """

    def __init__(self, blocks: list[torch.Tensor], start: int, kernel: AttentionKernel):
        self._blocks, self._start, self._kernel = iter(blocks), start, kernel

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(q, [(0, k, v)])

    def attend(self, q: torch.Tensor, pieces: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The same where keys and values come in pieces, each with its place among the tokens from `start` on."""
        keys, values = next(self._blocks)
        for place, k, v in pieces:
            tokens = slice(self._start + place, self._start + place + k.shape[1])
            keys[:, tokens], values[:, tokens] = k, v
        return self._kernel(q, keys, values)


class GatheredAttention(NativeAttention):
    """Self-attention of a patch that several ranks share, its kernel being `KeptKeys`.

    In a ring every rank keeps the keys and values of all tokens: those of the patch pass by and are written down, and
    each rank has the others already.
    """

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.group.degrees.ring == 1:
            return self.kernel(q, k, v)
        passing = self._passing(k, v, self.overlap)
        ulysses = self.group.degrees.ulysses
        return self.kernel.attend(q, ((sum(self.lengths[: at * ulysses]), k, v) for at, k, v in passing))


class PatchStream:
    """What one worker keeps of the streamed runs that it is asked for."""

    def __init__(self, stages: int, device: torch.device):
        self.stages, self.device = stages, device
        self._kept: dict[Hashable, list[torch.Tensor]] = {}
        self._run, self._attentions = "", 0

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(block.nbytes for blocks in self._kept.values() for block in blocks)

    def begin(self, step: Displaced, attentions: int) -> None:
        """Forget an earlier run.

        Args:
            attentions: how often an item's tokens go through self-attention in this stage: once a block, in one of VACE
                once for each context.
        """
        self._attentions = attentions
        if step.run != self._run:
            self.clear()
            self._run = step.run

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()

    def missing_bytes(
        self, batches: Sequence[tuple[str, ...]], model: WanModel, grid: Grid, group: SequenceGroup, heads: int
    ) -> int:
        """Bytes that `stretches` will allocate for these batch items, named as there."""
        new = (len(lanes) for lanes in batches if not self._has(lanes))
        return sum(math.prod(self._shape(n, model, grid, group, heads)) for n in new) * (
            self._attentions * model.compute_dtype.itemsize
        )

    def stretches(
        self,
        step: Displaced,
        lanes: tuple[str, ...],
        model: WanModel,
        grid: Grid,
        group: SequenceGroup,
        heads: int,
    ) -> list[Stretch]:
        """How some batch items go through this stage in a forward that is stale, or that fills in for one.

        Args:
            lanes: the items' names over the steps of the run.
            heads: of this rank's part of the model, over the whole sequence group.

        Raises:
            StaleError: there is nothing from the step before.
        """
        stale = step.kind == STALE
        if not self._has(lanes):
            if stale:
                raise StaleError("The workers have no keys and values of the step before. Queue the prompt again.")
            self._kept[lanes] = self._room(len(lanes), model, grid, group, heads)
        stretches = []
        for start, stop in cut(grid, self.stages) if stale else [(0, grid.tokens)]:
            kept = KeptKeys(self._kept[lanes], start, model.self_kernel)
            own = group.shard(stop - start)
            attend = GatheredAttention(group, kept, stop - start, heads) if group.degrees.ranks > 1 else kept
            stretches.append(Stretch(start + own[0], start + own[1], attend))
        return stretches

    def _has(self, lanes: tuple[str, ...]) -> bool:
        return len(self._kept.get(lanes, ())) == self._attentions

    def _room(self, batch: int, model: WanModel, grid: Grid, group: SequenceGroup, heads: int) -> list[torch.Tensor]:
        """Keys and values for each self-attention of this stage."""
        shape = self._shape(batch, model, grid, group, heads)
        release_cache(self.device)
        return [torch.zeros(shape, dtype=model.compute_dtype, device=self.device) for _ in range(self._attentions)]

    @staticmethod
    def _shape(batch: int, model: WanModel, grid: Grid, group: SequenceGroup, heads: int) -> tuple[int, ...]:
        """[2, B, tokens, heads, head_dim] of a self-attention."""
        own = group.heads(heads)[group.ulysses_index]
        return 2, batch, grid.tokens, own, model.config.head_dim
