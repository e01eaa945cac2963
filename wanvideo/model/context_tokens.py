"""Context tokens: tokens of further videos, to which the tokens of the denoised video attend. The context tokens follow
those of the denoised video in the sequence and are left out of the result.

Bernini's context is a source video, reference videos and images, each of its own size. The patch embedding of the
denoised video embeds context tokens too, unless a variant overrides `WanModel.embed_context`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..base.conditioning import Conditioning
from ..base.grid import grid_of, pad_to_patch, patchify
from ..base.options import PLAIN_ROPE, ContextGrid, RopeOptions
from ..base.variant import Key

CONTEXT_LATENTS = Key("context_latents", "source or reference videos", "BerniniConditioning")


def context_tokens_of(
    videos: Iterable[torch.Tensor], rope: RopeOptions = PLAIN_ROPE, stretched: bool = False, own_phases: bool = False
) -> tuple[torch.Tensor, tuple[ContextGrid, ...]]:
    """Cut latents of videos, each [B, C, T, H, W], into context tokens.

    Args:
        rope, stretched: see `ContextGrid`.
        own_phases: whether the first video has the phase 1, the second video the phase 2, and so on; else all have 0.

    Returns:
        The tokens [B, n, C*4] of all videos, one video after the other, and the grid of each video.
    """
    tokens, grids = [], []
    for number, video in enumerate(videos, 1):
        grid = grid_of(video)
        tokens.append(patchify(pad_to_patch(video)))
        grids.append(ContextGrid(*grid.shape, rope=rope, stretched=stretched, rope_phase=number if own_phases else 0))
    return torch.cat(tokens, dim=1), tuple(grids)


def with_context_videos(conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
    """The conditioning with Bernini's source and reference videos, which ComfyUI's keyword arguments `given` may hold.
    The position of a video in their list decides its phase, by which the model tells the videos apart."""
    latents = given.get(CONTEXT_LATENTS.name)
    if not latents:
        return conditioning
    context_videos, grids = context_tokens_of(latents, conditioning.options.rope, own_phases=True)
    return conditioning.having(replace(conditioning.options, context_grids=grids), context_videos=context_videos)
