"""One forward's tensors: checked, on their way to the workers, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...wanvideo.base.attention_choice import AttentionChoice
from ...wanvideo.base.conditioning import Conditioning, check, core, extended
from ...wanvideo.base.config import WanConfig
from ...wanvideo.base.grid import Grid, grid_of, sequence_of, unpatchify
from ...wanvideo.base.inputs import check_inputs, check_timestep
from ...wanvideo.checkpoint.weight_source import DTYPES
from ..protocol.refs import ConditioningRef, TensorRef
from ..protocol.requests import Displaced, Forward
from ..protocol.specs import ModelSpec
from ..shm.arena import Arena, ReusedArena, needed
from .shared_conditioning import SharedConditioning


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of one forward, as the workers get them.

    Args:
        x: latent [B, in_dim, T, H, W], with what the conditioning puts in front of it.
        timestep: sigma * 1000, [B] or [B, T].
        context: [B, L, text_dim].
        frames: latent frames that were asked for.
    """

    config: WanConfig
    x: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor
    conditioning: Conditioning
    frames: int

    @classmethod
    def checked(
        cls,
        config: WanConfig,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        conditioning: Conditioning,
    ) -> ForwardInputs:
        """The inputs of `Pool.forward`, extended by what the conditioning puts in front of the latent.

        Raises:
            ValueError: one of them has the wrong shape.
        """
        frames = x.shape[2] if x.ndim == 5 else 0
        check_inputs(config, x, context)
        check(config, x, conditioning)
        x, conditioning = extended(x, conditioning)
        check_timestep(x, timestep)
        return cls(config, x, timestep, context, conditioning, frames)

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return sequence_of(self.x, self.conditioning.options).tokens

    def write(self, arenas: ReusedArena, shared: SharedConditioning, dtype: torch.dtype, pinned: bool) -> SentForward:
        """Put the inputs where the workers read them. No request may be under way.

        Args:
            dtype: in which the conditioning travels.
            pinned: whether copies from and to GPUs shall be fast.
        """
        grid = grid_of(self.x)
        inputs = [self.x.detach().float(), self.timestep.detach().float(), self.context.detach()]
        size = needed(inputs) + len(self.x) * grid.tokens * self.config.out_dim * 16 + 64
        arena = arenas.of(size, pinned=pinned and self.x.is_cuda)
        x, timestep, context = (arena.write(tensor) for tensor in inputs)
        out = arena.allocate(torch.float32, (len(self.x), grid.tokens, self.config.out_dim * 4))
        return SentForward(self, arena, grid, x, timestep, context, out, shared.share(self.conditioning, dtype))


@dataclass(frozen=True)
class SentForward:
    """Where the tensors of one forward lie."""

    inputs: ForwardInputs
    arena: Arena
    grid: Grid
    x: TensorRef
    timestep: TensorRef
    context: TensorRef
    out: TensorRef
    conditioning: ConditioningRef | None

    def request(
        self, spec: ModelSpec, displaced: Displaced | None, attention: AttentionChoice
    ) -> Callable[[int], Forward]:
        """Makes the request of an id."""
        tensors = self.x, self.timestep, self.context, self.out
        return lambda number: Forward(number, spec, self.arena.ref, *tensors, displaced, self.conditioning, attention)

    def result(self) -> torch.Tensor:
        """The workers' result, float32 [B, out_dim, frames, H, W] on the device of x."""
        x = self.inputs.x
        frames, height, width = x.shape[-3:]
        result = unpatchify(self.arena.view(self.out).to(x.device, copy=True), self.grid, (frames, height, width))
        return core(result, self.inputs.frames, self.inputs.conditioning.options)


def sent_dtype(spec: ModelSpec) -> torch.dtype:
    """The dtype in which the conditioning of a model travels."""
    return DTYPES[spec.compute_dtype]
