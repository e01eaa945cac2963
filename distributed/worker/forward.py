"""One DiT forward on one rank: which items and tokens are this rank's, in which order they pass through its blocks, and
what is asked and done before each block.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...wanvideo.base.conditioning import NOTHING, Conditioning
from ...wanvideo.base.grid import Grid, Part, pad_to_patch, patchify, sequence_of
from ...wanvideo.model.layers import SelfAttention
from ...wanvideo.model.model import WanModel
from ..approximate.displaced import FillAttention, PatchParallel, StaleAttention
from ..approximate.pipefusion import PatchStream
from ..approximate.schedule import EXACT
from ..comm import timing
from ..parallel.groups import Membership
from ..parallel.pipeline import Flow
from ..parallel.sequence import SequenceGroup
from ..plan.degrees import Place, bounds
from ..protocol.refs import ArenaRef, TensorRef
from ..protocol.reports import Exchange
from ..protocol.requests import Displaced, Forward
from ..protocol.specs import ModelSpec
from ..shm.arena import ArenaReader
from ..shm.cancel import Gate
from ..weights.device_memory import MemoryMeter
from ..weights.models import Models
from ..weights.prefetch import BlockPrefetcher

_BLOCKS_AHEAD = 2
"""How far the host may run ahead of its GPU: else it had passed every cancel check before the first block ran."""


@dataclass(frozen=True)
class Portion:
    """Some batch items and tokens of one forward, as this rank works on them."""

    items: slice
    part: Part
    tokens: int
    attend: SelfAttention


class ForwardRunner:
    """Runs the forwards of one worker, and keeps what one leaves for the next.

    Args:
        arena: where inputs and results lie.
        memory: told when the weights are in place.
    """

    def __init__(self, membership: Membership, models: Models, gate: Gate, arena: ArenaReader, memory: MemoryMeter):
        self.membership, self.models, self.gate, self.arena, self.memory = membership, models, gate, arena, memory
        self.rank, self.device = membership.rank, membership.device
        settings, plan = membership.settings, membership.plan
        self.patches = PatchParallel(self.rank, plan, self.device)
        streamed = settings.pipeline_mode == "pipefusion" and plan.pipeline_parallel > 1
        self.stream = PatchStream(plan.pipeline_parallel, self.device) if streamed else None
        self._conditioning_arena = ArenaReader()
        self._kept: tuple[object, dict] = (None, {})  # what the model has computed from the conditioning of that key

    @property
    def kept_bytes(self) -> int:
        """Bytes on the device of keys and values that are kept between steps."""
        texts = sum(loaded.text_bytes for loaded in self.models.loaded.values())
        return self.patches.nbytes + (self.stream.nbytes if self.stream is not None else 0) + texts

    def trim(self) -> None:
        """Give back what only a sampling run needs."""
        self.patches.clear()
        self.forget()
        if self.stream is not None:
            self.stream.clear()

    def forget(self) -> None:
        """Drop what models have computed from their conditioning."""
        self._kept = (None, {})

    def run(self, request: Forward) -> Exchange | None:
        """Run this rank's batch items and tokens, and write the result where the client reads it."""
        loaded, plan = self.models.loaded[request.spec], self.membership.plan
        model, prefetcher = loaded.model, loaded.prefetcher
        with timing.standing(timing.LATENTS):
            x, timestep, context = (
                self._input(request.arena, ref) for ref in (request.x, request.timestep, request.context)
            )
        conditioning = self._conditioning(request, len(x))
        grid = sequence_of(x, conditioning.options)
        ranks = plan.group_ranks(len(x))
        group = self.membership.groups[plan.sequence_degrees(model.config.num_heads, ranks)]
        tokens = patchify(pad_to_patch(x))
        out = self.arena.view(request.arena, request.out)
        start, stop = group.shard(grid.tokens)
        if model.asks_other_ranks(conditioning):
            model.over_sequence = self.membership.over_sequence(group)
        step = self._begin(request.displaced, model, conditioning, grid, ranks)
        self.gate.begin(request.id)
        batches = self._batches(request.spec, len(x), self.membership.place.data)
        with timing.standing(timing.WEIGHTS):
            kept = self._to_keep(step, batches, model, grid, group)
            patches = request.displaced is not None and self.stream is None  # whose buffers have all that is left
            contexts = len(conditioning.options.vace_strengths)
            self.models.settle(request.spec, stop - start, kept, contexts, keep_texts=not patches)
        self.memory.begin()
        portions = [portion for items in batches for portion in self._portions(items, step, model, grid, group)]
        # ranks that gather weights from each other run the blocks equally often, and leave them together
        together = loaded.blocks.group.ranks > ranks
        missing = self._most_batches(request.spec, len(x)) - len(batches) if together else 0
        idle = missing * len(portions) // len(batches)
        before_block = self._before_block(prefetcher, len(x), together)
        flow = self._flow(portions, idle, model, conditioning, before_block)
        # tensor-parallel ranks have the same result
        writes = self.membership.stage.is_last and self.membership.place.tensor == 0
        with prefetcher.prefetching(len(portions) + idle):
            for portion, stream in flow:
                items, part = portion.items, portion.part
                try:
                    result = model.transform(
                        tokens[items, part] if stream is None else stream,
                        grid,
                        part,
                        timestep[items],
                        context[items],
                        portion.attend,
                        flow.before_block,
                        conditioning.items(items),
                    )
                finally:
                    if isinstance(portion.attend, FillAttention | StaleAttention):
                        portion.attend.finish()
                flow.pass_on(result)
                if writes:
                    with timing.standing(timing.LATENTS):
                        _write(out, items, part, result)
        stale = [portion.attend for portion in portions if isinstance(portion.attend, StaleAttention)]
        return self.patches.report(stale) if stale else None

    def _batches(self, spec: ModelSpec, batch: int, data: int) -> list[slice]:
        """The batch items of a data-parallel group, as many in each slice as go through the model at once."""
        plan = self.membership.plan
        if batch < plan.data_parallel:  # all groups work on each item together
            first, last = 0, batch
        else:
            first, last = bounds(batch, plan.data_parallel, data)
        step = min(spec.max_batch, math.ceil((last - first) / plan.pipeline_parallel))  # more slices fill a pipeline
        return [slice(start, min(start + step, last)) for start in range(first, last, step)]

    def _begin(
        self, step: Displaced | None, model: WanModel, conditioning: Conditioning, grid: Grid, ranks: int
    ) -> Displaced | None:
        """Begin an approximate step; None where it is computed exactly.

        Keys and values are kept of all blocks or none. Displaced patches have none of VACE's streams, nor of what lies
        behind the video. What other ranks are asked in a block is asked of all its tokens together.
        """
        layers = range(model.config.num_layers)
        if step is None or set(conditioning.options.skip_blocks) & set(layers) or model.asks_other_ranks(conditioning):
            return None
        if self.stream is not None:
            self.stream.begin(step, model.self_attentions(conditioning, model.span))
            return step
        if ranks == 1 or grid.tail or model.self_attentions(conditioning, layers) > len(layers):
            return None
        self.patches.begin(step)
        return step

    def _portions(
        self, items: slice, step: Displaced | None, model: WanModel, grid: Grid, group: SequenceGroup
    ) -> list[Portion]:
        """What this rank does for some batch items: its tokens, and how they see the others."""
        attend = self.membership.attention(group, model, grid, items.stop - items.start)
        start, stop = group.shard(grid.tokens)
        if step is None or step.kind == EXACT:
            return [Portion(items, slice(start, stop), stop - start, attend)]
        if self.stream is not None:
            heads = self.membership.heads(model)
            stretches = self.stream.stretches(step, step.lanes[items], model, grid, group, heads)
            return [Portion(items, slice(s.start, s.stop), s.stop - s.start, s.attend) for s in stretches]
        attend = self.patches.attention(step, step.lanes[items], model, grid, group, attend)
        part = attend.part
        return [Portion(items, part, part.stop - part.start if isinstance(part, slice) else len(part), attend)]

    def _to_keep(
        self, step: Displaced | None, batches: Sequence[slice], model: WanModel, grid: Grid, group: SequenceGroup
    ) -> int:
        """Bytes of keys and values that this forward will keep anew."""
        if self.stream is None or step is None or step.kind == EXACT:
            return 0
        lanes = [step.lanes[items] for items in batches]
        return self.stream.missing_bytes(lanes, model, grid, group, self.membership.heads(model))

    def _most_batches(self, spec: ModelSpec, batch: int) -> int:
        """Slices of batch items in the data-parallel group that has most of them."""
        return max(len(self._batches(spec, batch, data)) for data in range(self.membership.plan.data_parallel))

    def _flow(
        self,
        portions: Sequence[Portion],
        idle: int,
        model: WanModel,
        conditioning: Conditioning,
        before_block: Callable[[int, int | None], None],
    ) -> Flow[Portion]:
        """The portions of this rank on their way through its stage."""
        stage, carried = self.membership.stage, model.carried(model.span.start, conditioning)
        streams = (1 + carried,) if carried else ()
        return Flow(
            stage,
            portions,
            stage.most_blocks(model.config),
            lambda portion: (*streams, portion.items.stop - portion.items.start, portion.tokens, model.config.dim),
            self.device,
            before_block,
            idle,
            model.config.in_turn(model.span),
        )

    def _before_block(
        self, prefetcher: BlockPrefetcher, batch: int, together: bool
    ) -> Callable[[int, int | None], None]:
        """Called with the stage that decides and the block that comes next, if this rank has one: the cancel check of
        one request (see cancel.py), then the block's weights."""
        plan = self.membership.plan
        alone = not together and batch >= plan.data_parallel
        data = self.membership.place.data if alone else 0  # the first of those that work together
        leaders = [plan.rank_at(Place(data, stage, 0, 0)) for stage in range(plan.pipeline_parallel)]
        launched: deque[torch.cuda.Event] = deque()

        def check(stage: int, block: int | None) -> None:
            if self.device.type == "cuda":
                launched.append(torch.cuda.Event(blocking=True))
                launched[-1].record()
                if len(launched) > _BLOCKS_AHEAD:
                    launched.popleft().synchronize()
            with timing.standing(timing.GATE, sorted({self.rank, leaders[stage]})):
                self.gate.check(self.rank, leaders[stage])
            if block is not None:
                prefetcher.await_block(block)

        return check

    def _conditioning(self, request: Forward, batch: int) -> Conditioning:
        """The conditioning of a batch, left in the arena: the model fetches what belongs to its tokens."""
        ref = request.conditioning
        if ref is None:
            return NOTHING
        views = {name: self._conditioning_arena.view(ref.arena, tensor) for name, tensor in ref.tensors.items()}
        shared = {name: view.expand(batch, *view.shape[1:]) for name, view in views.items()}
        key = (ref.arena, request.spec, self.models.loaded[request.spec].uuid, batch)
        if self._kept[0] != key:
            self._kept = (key, {})
        return Conditioning(**shared, options=ref.options, kept=self._kept[1])

    def _input(self, arena: ArenaRef, ref: TensorRef) -> torch.Tensor:
        return self.arena.view(arena, ref).to(self.device)


def _write(out: torch.Tensor, items: slice, part: Part, result: torch.Tensor) -> None:
    """Put result [b, n, c] of some items and tokens into out [B, tokens of the video, c] on the CPU."""
    if isinstance(part, slice):
        video = out[items, part]  # without the tail of a sequence
        video.copy_(result[:, : video.shape[1]])
    else:
        out[items].index_copy_(1, part.cpu(), result.to(out.device))
