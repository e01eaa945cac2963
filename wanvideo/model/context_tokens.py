"""Tokens of further videos behind those of the one that is made: they are attended to, and left out of the result.

Bernini has a source video, reference videos and images there, each of its own size, which are embedded as the video
is. A variant may embed them otherwise (see `WanModel.embed_behind`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..base.conditioning import Conditioning
from ..base.grid import grid_of, pad_to_patch, patchify
from ..base.options import PLAIN_ROPE, RopeOptions, Segment
from ..base.variant import Key

CONTEXT_LATENTS = Key("context_latents", "source or reference videos", "BerniniConditioning")


def tail_of(
    videos: Iterable[torch.Tensor], rope: RopeOptions = PLAIN_ROPE, stretched: bool = False, turned: bool = False
) -> tuple[torch.Tensor, tuple[Segment, ...]]:
    """Cut videos, each [B, C, T, H, W], into the tokens [B, n, C*4] of a tail, and say what they are.

    Args:
        rope, stretched: see `Segment`.
        turned: turn the tokens of the first by 1, of the second by 2, and so on.
    """
    tokens, segments = [], []
    for number, video in enumerate(videos, 1):
        grid = grid_of(video)
        tokens.append(patchify(pad_to_patch(video)))
        segments.append(Segment(*grid.shape, rope=rope, stretched=stretched, turn=number if turned else 0))
    return torch.cat(tokens, dim=1), tuple(segments)


def with_context_videos(conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
    """The conditioning with Bernini's source and reference videos, which are among ComfyUI's keywords `given`, in the
    order that tells them apart."""
    latents = given.get(CONTEXT_LATENTS.name)
    if not latents:
        return conditioning
    tail, segments = tail_of(latents, conditioning.options.rope, turned=True)
    return conditioning.having(replace(conditioning.options, tail=segments), tail=tail)
