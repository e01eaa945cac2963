"""Tokens of further videos behind those of the one that is made: they are attended to, and left out of the result.

| of | what | embedded as |
|---|---|---|
| Bernini | a source video, reference videos and images, each of its own size | the video |
| SCAIL | a pose video at half the size | by an embedding of its own; SCAIL-2 adds that of its masks |
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..base.grid import grid_of, pad_to_patch, patchify
from ..base.options import PLAIN_ROPE, RopeOptions, Segment
from .layers import PatchEmbedding


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


def embed_tail(
    tokens: torch.Tensor, video: PatchEmbedding, pose: PatchEmbedding | None, mask: PatchEmbedding | None
) -> torch.Tensor:
    """Tokens [B, n, C*4] of a tail to float32 [B, n, dim].

    Args:
        video, pose, mask: what the model has; with `pose`, the channels behind those of the pose are masks.
    """
    tokens = tokens.float()
    if pose is None:
        return video(tokens)
    own = pose.weight[0].numel()
    x = pose(tokens[..., :own])
    return x + mask(tokens[..., own:]) if tokens.shape[-1] > own else x
