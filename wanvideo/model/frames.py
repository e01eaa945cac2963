"""Attention of video tokens to a few further tokens of their own frame, such as tokens of a face or of audio.

A video token sees the further tokens of its frame and no other video token. So a rank computes this attention for
whatever video tokens it holds, even for a part of a frame. The rank's tokens are taken in runs (`Run`), in each of
which every frame has equally many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..attention.kernels import AttentionKernel
from ..base.grid import Part
from ..base.shapes import Shapes


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a rank, given by their indices on the rank; each of `frames` has equally many of them."""

    tokens: slice
    frames: slice

    @property
    def length(self) -> int:
        """The number of frames of the run."""
        return self.frames.stop - self.frames.start

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The run's tokens [B * frames, tokens of a frame, d], out of the tokens x [B, n, d] of the whole rank."""
        return x[:, self.tokens].unflatten(1, (self.length, -1)).flatten(0, 1)

    def back(self, y: torch.Tensor) -> torch.Tensor:
        """Reshape y [B * frames, tokens of a frame, d] to [B, tokens of the run, d]: the reverse of `of`."""
        return y.unflatten(0, (-1, self.length)).flatten(1, 2)

    def own(self, v: torch.Tensor) -> torch.Tensor:
        """The entries of v [B, all frames, ...] for the frames of the run, as [B * frames, ...]."""
        return v[:, self.frames].flatten(0, 1)


def runs_of(part: Part, frame_tokens: int, frames: int) -> list[Run]:
    """The runs of the tokens `part` that lie in the first `frames` frames, each of `frame_tokens` tokens.

    A slice has up to three runs: its tokens of a first incomplete frame, its complete frames, and its tokens of a last
    incomplete frame.
    """
    if isinstance(part, slice):
        return list(_runs_of_slice(part.start, min(part.stop, frames * frame_tokens), frame_tokens))
    return list(_runs_of_places(part, frame_tokens, frames))


def _runs_of_slice(start: int, stop: int, frame_tokens: int) -> Iterator[Run]:
    at = start
    while at < stop:
        frame, inside = divmod(at, frame_tokens)
        count = (stop - at) // frame_tokens if not inside else 0
        end = at + count * frame_tokens if count else min(stop, (frame + 1) * frame_tokens)
        yield Run(slice(at - start, end - start), slice(frame, frame + max(count, 1)))
        at = end


def _runs_of_places(places: torch.Tensor, frame_tokens: int, frames: int) -> Iterator[Run]:
    indices, counts = torch.unique_consecutive(places // frame_tokens, return_counts=True)
    run, size, at = None, 0, 0
    for frame, count in zip(indices.tolist(), counts.tolist(), strict=True):
        tokens = slice(at, at + count)
        at += count
        if run is not None and count == size and frame == run.frames.stop < frames:
            run = Run(slice(run.tokens.start, at), slice(run.frames.start, frame + 1))
            continue
        if run is not None:
            yield run
        run, size = (Run(tokens, slice(frame, frame + 1)), count) if frame < frames else (None, 0)
    if run is not None:
        yield run


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _lse: bool) -> tuple[torch.Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None


few_keys = AttentionKernel("sdpa", _sdpa, has_lse=False)
"""The kernel for attention to a handful of keys: torch's own, as lossy kernels are not made for so few keys."""


class _Kernel(nn.Module):
    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, 3), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)


class CausalConvolution(nn.Module):
    """A Conv1d of size 3 over time whose output sees a frame and the two frames before; the first frame is repeated."""

    def __init__(self, columns: int, rows: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.conv = _Kernel(columns, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, t, columns] to [B, ceil(t / stride), rows], in float32."""
        x = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
        return F.conv1d(x, self.conv.weight, self.conv.bias, stride=self.stride).transpose(1, 2)


class CausalEncoder(nn.Module):
    """Encodes features of video frames as tokens of latent frames; four video frames make one latent frame.

    Args:
        columns: width of the features.
        widths: channels behind each of the three convolutions.
        heads: tokens made for a latent frame; a learned token comes behind these.
        token: width of the learned token.
    """

    def __init__(self, columns: int, widths: tuple[int, int, int], heads: int, token: int):
        super().__init__()
        self.heads = heads
        self.conv1_local = CausalConvolution(columns, widths[0] * heads)
        self.conv2 = CausalConvolution(widths[0], widths[1], stride=2)
        self.conv3 = CausalConvolution(widths[1], widths[2], stride=2)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, token), requires_grad=False)

    def encode(self, x: torch.Tensor, first: CausalConvolution, heads: int) -> torch.Tensor:
        """Encode x [B, t, columns] by the convolution `first`, for `heads` heads, and the two further convolutions:
        [B, ceil(t/4), heads, widths[2]]."""
        y = first(x).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
        for convolution in (self.conv2, self.conv3):
            y = convolution(_activated(y))
        return _activated(y).unflatten(0, (len(x), heads)).transpose(1, 2)

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append the learned token to the tokens [B, t, heads, token] of every frame: [B, t, heads + 1, token]."""
        learned = self.padding_tokens.to(tokens.dtype).expand(*tokens.shape[:2], 1, -1)
        return torch.cat([tokens, learned], dim=2)


def causal_encoder_shapes(name: str, columns: int, widths: tuple[int, int, int], heads: int, token: int) -> Shapes:
    """The tensors of the `CausalEncoder` called `name`; see there for the other arguments."""
    shapes: Shapes = {f"{name}.padding_tokens": (1, 1, 1, token)}
    shapes |= causal_convolution_shapes(f"{name}.conv1_local", columns, widths[0] * heads)
    shapes |= causal_convolution_shapes(f"{name}.conv2", widths[0], widths[1])
    return shapes | causal_convolution_shapes(f"{name}.conv3", widths[1], widths[2])


def causal_convolution_shapes(name: str, columns: int, rows: int) -> Shapes:
    """The tensors of the `CausalConvolution` called `name`."""
    return {f"{name}.conv.weight": (rows, columns, 3), f"{name}.conv.bias": (rows,)}


def _activated(x: torch.Tensor) -> torch.Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))
