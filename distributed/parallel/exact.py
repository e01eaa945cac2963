"""The exact strategy: each rank has a run of the tokens, whose self-attention sees all tokens as one device would."""

from __future__ import annotations

import logging

from ...wanvideo.attention.kernels import AttentionKernel
from ...wanvideo.base.grid import Grid
from ...wanvideo.model.layers import SelfAttention
from ...wanvideo.model.model import WanModel
from ..protocol.requests import EXACT
from ..shm.pinned import HostMemoryError
from .groups import ParallelGroups
from .sequence_attention import NativeAttention
from .sequence_group import SequenceGroup
from .strategy import Step, StepInputs, Strategy, WorkItem
from .ulysses_overlap import OverlappedAttention
from .xfuser_backend import XfuserAttention

log = logging.getLogger(__name__)


class ExactStep(Step):
    """A forward on the exact path."""

    def __init__(self, parallel: ParallelGroups, inputs: StepInputs):
        self.parallel, self.inputs = parallel, inputs

    def work(self, items: slice) -> list[WorkItem]:
        """This rank's shard of the tokens, in one pass."""
        given = self.inputs
        start, stop = given.group.shard(given.grid.tokens)
        batch = items.stop - items.start
        attend = exact_attention(self.parallel, given.group, given.model, given.grid, batch, given.self_kernel)
        return [WorkItem(items, slice(start, stop), stop - start, attend)]


class Exact(Strategy, name=EXACT):
    """Ulysses x ring, on torch.distributed or on xfuser."""

    def begin(self, inputs: StepInputs) -> Step:
        """Begin a forward, which depends on no other."""
        return ExactStep(self.parallel, inputs)


def exact_attention(
    parallel: ParallelGroups,
    group: SequenceGroup,
    model: WanModel,
    grid: Grid,
    batch: int,
    kernel: AttentionKernel,
) -> SelfAttention:
    """Exact self-attention of this rank's tokens to those of all ranks of `group`, for `batch` items at a time.

    A collective call of the group.

    Args:
        kernel: of self-attention.

    Raises:
        BackendError: xfuser is to do it, and cannot share this sequence.
    """
    heads, degrees = parallel.heads(model), group.degrees
    if degrees.ranks == 1:
        return kernel
    if degrees in parallel.xfuser_groups:
        return XfuserAttention(parallel.xfuser_groups[degrees], kernel, grid.tokens, heads)
    if degrees in parallel.peer_memories:
        attend = OverlappedAttention(group, kernel, grid.tokens, heads, parallel.peer_memories[degrees])
        try:
            attend.reserve(batch, model.config.head_dim, model.compute_dtype)
            return attend
        except HostMemoryError as error:
            parallel.leave_peer_memory(degrees)
            log.warning("%s Until the workers start anew, exchanges go through NCCL one after the other.", error)
    return NativeAttention(group, kernel, grid.tokens, heads, parallel.settings.overlap)
