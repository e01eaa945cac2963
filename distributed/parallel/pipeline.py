"""Pipeline parallelism on one page: the blocks are divided into stages on different ranks.

Exact: a stage gets the residual stream of the stage before, in float32. While one batch item (the conditional or the
unconditional branch) is in a stage, the next one is in the stage before. Self-attention needs all tokens of a block
before the next can begin, so a single item is in one stage at a time: stages then save memory, and no time.

A side block (one of VACE) is with the block of the video that it runs behind, and the side streams go from stage to
stage with the residual stream while a side block is to come. (1 + streams) x tokens x width x 4 bytes then cross each
border between stages for each item: 1.34 GB for 14B at 480p with one side stream, twice as much as without any.

Time runs in slots. In slot s, stage p works on item s - p. Between two slots every stage sends its result to the next
stage. All stages agree block by block, in idle slots too, on whether the request is cancelled (see cancel.py); the
foremost stage that has work decides. So all stages leave a request together, and no stage waits for a lost result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from ...wanvideo.base.config import WanConfig
from ..comm import timing
from ..plan.degrees import bounds

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Stage:
    """One of `len(ranks)` pipeline stages: rank i has stage i of the pipeline that this rank stands in."""

    index: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, index: int, stages: int) -> Stage:
        """A stage as arithmetic needs it, wherever its ranks are."""
        return cls(index, tuple(range(stages)))

    @property
    def is_last(self) -> bool:
        """Whether the stage makes the result."""
        return self.index == len(self.ranks) - 1

    def span(self, num_layers: int) -> range:
        """The blocks of this stage."""
        return range(*bounds(num_layers, len(self.ranks), self.index))

    def most_blocks(self, config: WanConfig) -> int:
        """Blocks of the stage that has most of them, side blocks included."""
        stages = (Stage.of(index, len(self.ranks)) for index in range(len(self.ranks)))
        return max(len(config.run_order(stage.span(config.num_layers))) for stage in stages)

    def holds(self, name: str, config: WanConfig) -> bool:
        """Whether this stage needs the tensor of that name: conditioning is computed by every stage itself."""
        part = name.partition(".")[0]
        if (block := config.video_block_number(name)) is not None:
            return block in self.span(config.num_layers)
        if part == "patch_embedding" or any(part in variant.first_stage for variant in config.variants):
            return self.index == 0
        last = part == "head" or any(part in variant.last_stage for variant in config.variants)
        return self.is_last or not last


class Flow(Generic[Batch]):
    """Passes the batches of one request through the stages. Iterate over a flow to work on the batches that come:

        for batch, stream in flow:      # stream: the residual stream of the stage before, None in the first
            flow.pass_on(the work of this stage's blocks, with flow.before_block before each)

    Args:
        stage: this rank's stage.
        batches: whatever goes through the stages one after the other, such as slices of batch items.
        blocks: how many blocks the longest stage has.
        shape: gives the shape of the residual stream in which a batch arrives on this rank, such as [items, tokens,
            dim].
        check: called with the stage that decides, and with the block that comes next (None where this stage has none);
            raises to leave.
        idle: how many more batches other ranks have that share this stage's weights. This stage then goes through its
            blocks without work.
        span: the blocks of this stage, in the order in which they run.
    """

    def __init__(
        self,
        stage: Stage,
        batches: Sequence[Batch],
        blocks: int,
        shape: Callable[[Batch], tuple[int, ...]],
        device: torch.device,
        check: Callable[[int, int | None], None],
        idle: int = 0,
        span: Sequence[int] = (),
    ):
        self.stage, self.batches, self.blocks = stage, batches, blocks
        self.idle, self.span = idle, span
        self._shape, self._device, self._check = shape, device, check
        self._slot = self._checked = 0
        self._result: torch.Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor | None]]:
        stream = None
        passes = len(self.batches) + self.idle
        slots = passes + len(self.stage.ranks) - 1 if passes else 0
        for slot in range(slots):
            self._slot, self._checked = slot, 0
            batch = self._batch(slot)
            if batch is not None:
                yield batch, stream
            elif 0 <= slot - self.stage.index < passes:
                for block in self.span:
                    self.before_block(block)
            with timing.measure_wait(timing.PIPELINE, self.stage.ranks):
                while self._checked < self.blocks:  # blocks of longer stages, or this stage is idle
                    self.before_block(None)
                stream = self._exchange()

    def before_block(self, block: int | None) -> None:
        """Go on to a block, or leave the request together with all other stages."""
        self._checked += 1
        self._check(min(self._slot, len(self.stage.ranks) - 1), block)

    def pass_on(self, result: torch.Tensor) -> None:
        """Take the residual stream behind this stage's blocks, for the next stage. The last stage's stream is sent
        nowhere."""
        self._result = None if self.stage.is_last else result

    def _batch(self, slot: int) -> Batch | None:
        """The batch that this stage works on in a slot; None where the stage is idle."""
        place = slot - self.stage.index
        return self.batches[place] if 0 <= place < len(self.batches) else None

    def _exchange(self) -> torch.Tensor | None:
        """Send this stage's result of a slot to the next stage, and receive the result of the stage before."""
        operations, arrived = [], None
        if self._result is not None and self._result.numel():
            to = self.stage.ranks[self.stage.index + 1]
            operations.append(dist.P2POp(dist.isend, self._result.contiguous(), to, self.stage.group))
        following = self._batch(self._slot + 1)
        if following is not None and self.stage.index > 0:
            arrived = torch.empty(self._shape(following), device=self._device)
            if arrived.numel():
                source = self.stage.ranks[self.stage.index - 1]
                operations.append(dist.P2POp(dist.irecv, arrived, source, self.stage.group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        self._result = None
        return arrived
