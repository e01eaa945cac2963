"""The attention of one forward: the model's own kernels, or what the request asks for in their place.

Kernels are loaded when a forward first asks for them, so that a change of attention costs no load of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ...wanvideo.attention import sparse as sparse_attention
from ...wanvideo.attention.kernels import AttentionKernel, get_kernel
from ...wanvideo.attention.sparse import ExactTokens, SparseAttention
from ...wanvideo.base.attention_choice import AttentionChoice, SparseSettings, sparse_bytes
from ...wanvideo.base.grid import Grid
from ...wanvideo.base.options import Options
from ...wanvideo.model.model import WanModel
from ..protocol.reports import AttentionUse
from ..shm import signs
from ..shm.signs import Mark
from ..weights.models import Models

Kernel = TypeVar("Kernel")


@dataclass(frozen=True)
class ForwardAttention:
    """The kernels of one forward.

    Attributes:
        self_kernel, cross_kernel: None is the model's own.
        sparse: self-attention that is told which block comes; None where all blocks are dense.
        nbytes: bytes that the kernels take beyond those of dense attention.
        use: what runs, for the status; None where the request asks for nothing.
    """

    self_kernel: AttentionKernel | None = None
    cross_kernel: AttentionKernel | None = None
    sparse: SparseAttention | None = None
    nbytes: int = 0
    use: AttentionUse | None = None

    def telling(self, before_block: Callable[[int], None], num_layers: int) -> Callable[[int], None]:
        """`before_block`, which then also tells sparse attention the block of the video that is computed.

        A variant's own block, which runs behind a block of the video, counts as this block.
        """
        sparse = self.sparse
        if sparse is None:
            return before_block

        def tell(number: int) -> None:
            before_block(number)
            if number < num_layers:
                sparse.block = number

        return tell


class AttentionKernels:
    """Makes the attention of forwards, with kernels that are tried out once on all ranks together."""

    def __init__(self, models: Models):
        self._models = models
        self._ready: dict[tuple[str, str, int], Any] = {}

    def of(
        self, choice: AttentionChoice, model: WanModel, grid: Grid, options: Options, heads: int, items: int
    ) -> ForwardAttention:
        """The attention that `choice` asks for. A collective call of all ranks.

        Args:
            grid, options: of the whole sequence.
            heads: that this rank computes for all tokens.
            items: batch items that go through the model at once.

        Raises:
            AttentionError, SparseError: the settings or the device do not allow it.
        """
        cross = self._dense(choice.kernel, model) if choice.kernel else None
        dense = cross or model.self_kernel
        settings = choice.sparse
        if settings is None:
            use = AttentionUse(dense.name, 0, model.config.num_layers) if cross else None
            return ForwardAttention(cross, cross, use=use)
        settings.validate(model.config.num_layers)
        why_dense = settings.why_dense(grid.tokens, choice.sigma)
        use = _use(settings, model, dense, why_dense)
        if why_dense:
            return ForwardAttention(cross, cross, use=use)
        exact = exact_tokens(grid, options)
        sparse = SparseAttention(self._sparse(model), dense, settings, exact)
        return ForwardAttention(sparse.kernel, cross, sparse, items * sparse_bytes(grid.tokens, heads), use)

    def _dense(self, name: str, model: WanModel) -> AttentionKernel:
        return self._together(name, model, lambda: get_kernel(name, self._models.device, model.compute_dtype))

    def _sparse(self, model: WanModel) -> sparse_attention.Function:
        given = self._models.device, model.compute_dtype, model.config.head_dim
        return self._together("sparse", model, lambda: sparse_attention.load(*given))

    def _together(self, name: str, model: WanModel, load: Callable[[], Kernel]) -> Kernel:
        """Load a kernel on all ranks or on none: where GPUs are unlike, the others would wait for one that fails."""
        key = name, str(model.compute_dtype), model.config.head_dim
        if key not in self._ready:
            with signs.marked(Mark.FIRST), self._models.all_or_none():
                kernel = load()
            self._ready[key] = kernel
        return self._ready[key]


def exact_tokens(grid: Grid, options: Options) -> ExactTokens:
    """The tokens of a sequence that are not the video's: reference frames in front, and further frames and context
    tokens behind."""
    front = options.reference_frames * grid.frame_tokens
    return ExactTokens(front, options.extra_frames * grid.frame_tokens + grid.context_tokens)


def _use(settings: SparseSettings, model: WanModel, dense: AttentionKernel, why_dense: str) -> AttentionUse:
    layers = model.config.num_layers
    blocks = layers - len(settings.dense_blocks)
    return AttentionUse(dense.name, 0 if why_dense else blocks, layers, settings.describe(), why_dense)
