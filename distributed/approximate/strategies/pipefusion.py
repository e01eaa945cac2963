"""PipeFusion: the patches of a video streamed through pipeline stages, approximately (Fang et al., arXiv 2405.14430).

While there is one batch item, it leaves all but one of the stages idle (see pipeline.py). Runs of tokens, called
patches as in the paper, keep all stages busy: patch after patch passes through all blocks. A stage keeps the keys and
values of all tokens for its own blocks. When a patch passes, the kept keys and values of the patches that passed before
it in this step are fresh, as its own are; those of the patches that will pass after it are of the step before. That is
an approximation, good while two successive steps look alike, so the first steps of a run, and some later ones, are
exact and leave their keys and values for the next step.

With VACE a patch goes through the stages with its part of the control streams. Self-attention in VACE's blocks keeps
keys and values as self-attention of the video does.

Patches are whole frames where there are enough frames, and rows of tokens elsewhere. Patches that split the width are
known to tear the video.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

import torch

from ....wanvideo.attention.kernels import AttentionKernel
from ....wanvideo.base.grid import Grid
from ...parallel.groups import ParallelGroups
from ...parallel.sequence_attention import SequenceAttention
from ...parallel.sequence_group import SequenceGroup
from ...parallel.strategy import Step, StepInputs, WorkItem
from ...plan.degrees import bounds
from ...protocol.requests import Displaced
from ...weights.device_memory import release_cache
from ..schedule import STALE
from ..stale import StaleError, StaleStrategy

PATCHES_PER_STAGE = 4
"""With four patches for each stage, n stages are busy for 4n / (5n - 1) of the time on one item: 8/9 for 2 stages,
16/19 for 4."""


def cut(grid: Grid, stages: int) -> list[tuple[int, int]]:
    """Start and stop of each patch in tokens, in the order in which patches pass through the stages.

    There are fewer than `PATCHES_PER_STAGE` patches for each stage where a video has too few rows. Tokens behind the
    video go first, in runs no longer than the video's patches, so that the video's patches see them fresh.
    """
    wanted, unit = PATCHES_PER_STAGE * stages, grid.rows * grid.columns
    if grid.frames < wanted:
        unit = grid.columns
    units = grid.video_tokens // unit
    edges = [bounds(units, min(wanted, units), i) for i in range(min(wanted, units))]
    video = [(start * unit, stop * unit) for start, stop in edges]
    runs = math.ceil(grid.context_tokens / (video[0][1] - video[0][0]))
    behind = (bounds(grid.context_tokens, runs, i) for i in range(runs))
    return [*((grid.video_tokens + start, grid.video_tokens + stop) for start, stop in behind), *video]


class KeptKeys:
    """Self-attention to the kept keys and values of all tokens; each call brings those of some tokens up to date.

    Called block by block with tokens [start, start + n): q, k, v [B, n, heads, head_dim].
    """

    def __init__(self, blocks: list[torch.Tensor], start: int, kernel: AttentionKernel):
        self._blocks, self._start, self._kernel = iter(blocks), start, kernel

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The attention output of these tokens, [B, n, heads, head_dim]."""
        return self.attend(q, [(0, k, v)])

    def attend(self, q: torch.Tensor, pieces: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Self-attention of q where keys and values come in pieces (n, k, v) of the tokens from `start` + n on."""
        keys, values = next(self._blocks)
        for place, k, v in pieces:
            tokens = slice(self._start + place, self._start + place + k.shape[1])
            keys[:, tokens], values[:, tokens] = k, v
        return self._kernel(q, keys, values)


class GatheredAttention(SequenceAttention):
    """Self-attention of a patch that several ranks share, to the keys and values that each of them keeps.

    In a ring every rank keeps the keys and values of all tokens: the keys and values of the patch pass by, and each
    rank writes them to those that it keeps already.
    """

    def __init__(self, group: SequenceGroup, kept: KeptKeys, tokens: int, heads: int):
        super().__init__(group, tokens, heads)
        self.kept = kept

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, tokens of the Ulysses group, share of the heads, head_dim]; returns the output, same shape."""
        if self.group.degrees.ring == 1:
            return self.kept(q, k, v)
        ulysses, passing = self.group.degrees.ulysses, self.passing(k, v, overlap=True)
        return self.kept.attend(q, ((sum(self.lengths[: at * ulysses]), k, v) for at, k, v in passing))


class StreamedStep(Step):
    """A forward whose keys and values are kept: exact, or stale, in patches that see keys and values of the step
    before.

    Args:
        kept: keys and values by the names of batch items, one tensor [2, B, tokens, heads, head_dim] for each
            self-attention of this stage. An item's tokens go through self-attention once in a block, and in one of VACE
            once for each context.
        heads: how many heads this rank's part of the model has, over the whole sequence group.
    """

    def __init__(
        self,
        kept: dict[Hashable, list[torch.Tensor]],
        inputs: StepInputs,
        step: Displaced,
        stages: int,
        heads: int,
        device: torch.device,
    ):
        self._kept, self.inputs, self.step = kept, inputs, step
        self.stages, self.heads, self.device = stages, heads, device
        self._attentions = inputs.model.self_attentions(inputs.conditioning, inputs.model.span)

    @property
    def new_bytes(self) -> int:
        """Bytes of the keys and values that no step before has left."""
        batches = (self.step.branch_ids[items] for items in self.inputs.batches)
        elements = sum(math.prod(self._shape(len(branch_ids))) for branch_ids in batches if not self._has(branch_ids))
        return elements * self._attentions * self.inputs.model.compute_dtype.itemsize

    def work(self, items: slice) -> list[WorkItem]:
        """How some batch items go through this stage: patch after patch in a stale step, else whole.

        Raises:
            StaleError: no keys and values of the step before are kept.
        """
        grid, group, kernel = self.inputs.grid, self.inputs.group, self.inputs.self_kernel
        branch_ids, stale = self.step.branch_ids[items], self.step.kind == STALE
        if not self._has(branch_ids):
            if stale:
                raise StaleError.nothing_kept()
            self._kept[branch_ids] = self.allocate(len(branch_ids))
        work = []
        for start, stop in cut(grid, self.stages) if stale else [(0, grid.tokens)]:
            kept = KeptKeys(self._kept[branch_ids], start, kernel)
            first, last = (start + own for own in group.shard(stop - start))
            shared = group.degrees.ranks > 1
            attend = GatheredAttention(group, kept, stop - start, self.heads) if shared else kept
            work.append(WorkItem(items, slice(first, last), last - first, attend))
        return work

    def allocate(self, batch: int) -> list[torch.Tensor]:
        """Keys and values of `batch` items for each self-attention of this stage."""
        release_cache(self.device)
        shape, dtype = self._shape(batch), self.inputs.model.compute_dtype
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(self._attentions)]

    def _has(self, branch_ids: tuple[str, ...]) -> bool:
        return len(self._kept.get(branch_ids, ())) == self._attentions

    def _shape(self, batch: int) -> tuple[int, ...]:
        """[2, B, tokens, heads, head_dim] of a self-attention."""
        group = self.inputs.group
        own = group.heads(self.heads)[group.ulysses_index]
        return 2, batch, self.inputs.grid.tokens, own, self.inputs.model.config.head_dim


class PipeFusion(StaleStrategy, name="pipefusion"):
    """PipeFusion on one worker, with the keys and values that the worker keeps of a streamed run."""

    def __init__(self, parallel: ParallelGroups):
        super().__init__(parallel)
        self._kept: dict[Hashable, list[torch.Tensor]] = {}

    def suits(self, inputs: StepInputs) -> bool:
        """Whether there are several pipeline stages, which patches can keep busy."""
        return self.parallel.plan.pipeline_parallel > 1

    def approximate(self, inputs: StepInputs, step: Displaced) -> Step:
        """A forward that leaves its keys and values in this stage, or one whose patches use them."""
        stages, heads = self.parallel.plan.pipeline_parallel, self.parallel.heads(inputs.model)
        return StreamedStep(self._kept, inputs, step, stages, heads, self.parallel.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(block.nbytes for blocks in self._kept.values() for block in blocks)

    def trim(self) -> None:
        """Drop the keys and values of the run."""
        self._kept.clear()
