"""One DiT forward on one rank: its inputs, its batch items, what its strategy makes of them (see parallel/strategy.py),
the way through the blocks, and what is asked and done before each block.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...wanvideo.base.conditioning import NOTHING, Conditioning
from ...wanvideo.base.grid import Part, pad_to_patch, patchify, sequence_of
from ..approximate import strategies as _strategies  # noqa: F401 (registers them)
from ..comm import timing
from ..parallel.groups import ParallelGroups
from ..parallel.pipeline import Flow
from ..parallel.strategy import Step, StepInputs, Strategies, WorkItem
from ..plan.degrees import bounds
from ..plan.ranks import RankCoords
from ..protocol.refs import ArenaRef, TensorRef
from ..protocol.reports import Exchange
from ..protocol.requests import Forward
from ..protocol.specs import ModelSpec
from ..shm import signs
from ..shm.arena import ArenaReader
from ..shm.cancel import CancelBarrier
from ..shm.signs import Activity, Mark
from ..weights.device_memory import MemoryMeter
from ..weights.loaded import LoadedModel
from ..weights.models import Models
from ..weights.prefetch import BlockPrefetcher

_BLOCKS_AHEAD = 2
"""How far the host may run ahead of its GPU: else it had passed every cancel check before the first block ran."""


@dataclass(frozen=True)
class Tensors:
    """What one forward reads, on this rank's device, and where its result goes.

    Attributes:
        x: latent [B, in_dim, T, H, W].
        timestep: [B] or [B, T].
        context: text embedding [B, L, text_dim].
        out: result [B, tokens of the video, 4*out_dim] in the client's memory.
    """

    x: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor
    out: torch.Tensor


class ForwardRunner:
    """Runs the forwards of one worker, and keeps what one leaves for the next.

    Args:
        arena: where inputs and results lie.
        memory: told when the weights are in place.
    """

    def __init__(
        self, parallel: ParallelGroups, models: Models, barrier: CancelBarrier, arena: ArenaReader, memory: MemoryMeter
    ):
        self.parallel, self.models, self.barrier, self.arena, self.memory = parallel, models, barrier, arena, memory
        self.rank, self.device = parallel.rank, parallel.device
        self.strategies = Strategies(parallel)
        self._conditioning_arena = ArenaReader()
        self._kept: tuple[object, dict] = (None, {})  # what the model has computed from the conditioning of that key

    @property
    def kept_bytes(self) -> int:
        """Bytes on the device of keys and values that are kept between steps."""
        texts = sum(loaded.text_bytes for loaded in self.models.loaded.values())
        return self.strategies.nbytes + texts

    def trim(self) -> None:
        """Give back what only a sampling run needs."""
        self.strategies.trim()
        self.forget()

    def close(self) -> None:
        """Give back all memory. The next forward begins anew."""
        self.strategies.close()
        self.forget()

    def forget(self) -> None:
        """Drop what models have computed from their conditioning."""
        self._kept = (None, {})

    def run(self, request: Forward) -> Exchange | None:
        """Run this rank's batch items and tokens, and write the result where the client reads it."""
        loaded, strategy = self.models.loaded[request.spec], self.strategies.named(request.strategy)
        model, tensors = loaded.model, self._tensors(request)
        inputs = self._step_inputs(request, loaded, tensors.x)
        tokens = patchify(pad_to_patch(tensors.x))
        step = strategy.begin(inputs)
        self.barrier.begin(request.id)
        self._settle(request.spec, inputs, step, strategy.keeps_texts)
        self.memory.begin()
        work = [item for items in inputs.batches for item in step.work(items)]
        flow = self._flow(request.spec, loaded, inputs, work, len(tensors.x))
        # tensor-parallel ranks have the same result
        writes = self.parallel.stage.is_last and self.parallel.coords.tensor == 0
        with loaded.prefetcher.prefetching(len(work) + flow.idle):
            for item, stream in flow:
                items, part = item.items, item.part
                try:
                    result = model.transform(
                        tokens[items, part] if stream is None else stream,
                        inputs.grid,
                        part,
                        tensors.timestep[items],
                        tensors.context[items],
                        item.attend,
                        flow.before_block,
                        inputs.conditioning.items(items),
                    )
                finally:
                    item.finish()
                flow.pass_on(result)
                if writes:
                    with timing.measure_wait(timing.LATENTS):
                        _write(tensors.out, items, part, result)
        if self.device.type == "cpu":  # where weights may be the pages of the file
            loaded.source.check_unchanged()
        return step.report()

    def _tensors(self, request: Forward) -> Tensors:
        refs, out = (request.x, request.timestep, request.context), self.arena.view(request.arena, request.out)
        with timing.measure_wait(timing.LATENTS):
            x, timestep, context = (self._input(request.arena, ref) for ref in refs)
        return Tensors(x, timestep, context, out)

    def _step_inputs(self, request: Forward, loaded: LoadedModel, x: torch.Tensor) -> StepInputs:
        """What the strategy is told."""
        model, plan = loaded.model, self.parallel.plan
        conditioning = self._conditioning(request, loaded, len(x))
        degrees = plan.sequence_degrees(model.config.num_heads, plan.group_ranks(len(x)))
        group = self.parallel.groups[degrees]
        if model.asks_other_ranks(conditioning):
            model.over_sequence = self.parallel.over_sequence(group)
        batches = self._batches(request.spec, len(x), self.parallel.coords.data)
        grid = sequence_of(x, conditioning.options)
        return StepInputs(model, conditioning, grid, group, batches, request.displaced)

    def _settle(self, spec: ModelSpec, inputs: StepInputs, step: Step, keep_texts: bool) -> None:
        """Put the weights in place, with room for what the forward takes and will keep."""
        start, stop = inputs.group.shard(inputs.grid.tokens)
        contexts = len(inputs.conditioning.options.vace_strengths)
        with timing.measure_wait(timing.WEIGHTS):
            self.models.settle(spec, stop - start, step.new_bytes, contexts, keep_texts=keep_texts)

    def _batches(self, spec: ModelSpec, batch: int, data: int) -> list[slice]:
        """The batch items of a data-parallel group, as many in each slice as go through the model at once."""
        plan = self.parallel.plan
        if batch < plan.data_parallel:  # all groups work on each item together
            first, last = 0, batch
        else:
            first, last = bounds(batch, plan.data_parallel, data)
        step = min(spec.max_batch, math.ceil((last - first) / plan.pipeline_parallel))  # more slices fill a pipeline
        return [slice(start, min(start + step, last)) for start in range(first, last, step)]

    def _most_batches(self, spec: ModelSpec, batch: int) -> int:
        """Slices of batch items in the data-parallel group that has most of them."""
        return max(len(self._batches(spec, batch, data)) for data in range(self.parallel.plan.data_parallel))

    def _flow(
        self, spec: ModelSpec, loaded: LoadedModel, inputs: StepInputs, work: Sequence[WorkItem], batch: int
    ) -> Flow[WorkItem]:
        """The work of this rank on its way through its stage."""
        model, stage = loaded.model, self.parallel.stage
        # ranks that gather weights from each other run the blocks equally often, and leave them together
        together = loaded.blocks.group.ranks > inputs.group.degrees.ranks
        missing = self._most_batches(spec, batch) - len(inputs.batches) if together else 0
        carried = model.carried(model.span.start, inputs.conditioning)
        streams = (1 + carried,) if carried else ()
        idle, blocks = missing * len(work) // len(inputs.batches), stage.most_blocks(model.config)
        signs.begin(Activity.FORWARD, blocks * (len(work) + idle + len(stage.ranks) - 1))
        return Flow(
            stage,
            work,
            blocks,
            lambda item: (*streams, item.items.stop - item.items.start, item.tokens, model.config.dim),
            self.device,
            self._before_block(loaded.prefetcher, batch, together),
            idle,
            model.config.run_order(model.span),
        )

    def _before_block(
        self, prefetcher: BlockPrefetcher, batch: int, together: bool
    ) -> Callable[[int, int | None], None]:
        """Called with the stage that decides and the block that comes next, if this rank has one: the cancel check of
        one request (see cancel.py), then the block's weights."""
        plan = self.parallel.plan
        alone = not together and batch >= plan.data_parallel
        data = self.parallel.coords.data if alone else 0  # the first of those that work together
        leaders = [plan.mesh.rank(RankCoords(data, stage, 0, 0)) for stage in range(plan.pipeline_parallel)]
        launched: deque[torch.cuda.Event] = deque()

        def check(stage: int, block: int | None) -> None:
            signs.step()
            if self.device.type == "cuda":
                launched.append(torch.cuda.Event(blocking=True))
                launched[-1].record()
                if len(launched) > _BLOCKS_AHEAD:
                    with signs.marked(Mark.DEVICE):
                        launched.popleft().synchronize()
            with timing.measure_wait(timing.CANCEL_BARRIER, sorted({self.rank, leaders[stage]})):
                self.barrier.check(self.rank, leaders[stage])
            if block is not None:
                prefetcher.await_block(block)

        return check

    def _conditioning(self, request: Forward, loaded: LoadedModel, batch: int) -> Conditioning:
        """The conditioning of a batch, left in the arena: the model fetches what belongs to its tokens."""
        ref = request.conditioning
        if ref is None:
            return NOTHING
        arena, views = ref.arena, {}
        if arena is not None:  # options alone have none
            views = {name: self._conditioning_arena.view(arena, tensor) for name, tensor in ref.tensors.items()}
        shared = {name: view.expand(batch, *view.shape[1:]) for name, view in views.items()}
        key = (arena, request.spec, loaded.uuid, batch)
        if self._kept[0] != key:
            self._kept = (key, {})
        return Conditioning(ref.options, self._kept[1], shared)

    def _input(self, arena: ArenaRef, ref: TensorRef) -> torch.Tensor:
        return self.arena.view(arena, ref).to(self.device)


def _write(out: torch.Tensor, items: slice, part: Part, result: torch.Tensor) -> None:
    """Put result [b, n, c] of some items and tokens into out [B, tokens of the video, c] on the CPU."""
    if isinstance(part, slice):
        video = out[items, part]  # without context tokens
        video.copy_(result[:, : video.shape[1]])
    else:
        out[items].index_copy_(1, part.cpu(), result.to(out.device))
