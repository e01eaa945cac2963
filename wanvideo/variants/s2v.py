"""Wan 2.2 S2V: a text-to-video model that hears sound, and that knows a subject and the video so far.

The subject's tokens and those of the video so far lie behind the tokens of the latent: they have a time (0) and
positions of their own, and are no part of the result. Of the video so far, the last frame is as fine as the latent,
what lies farther back coarser. Behind some blocks the tokens of a frame attend to the sound of that frame. All of it
acts on any part of the tokens.

Sources: Wan 2.2 `wan/modules/s2v/`; the packing of frames is that of FramePack (arXiv 2504.12626). Shapes, orders and
positions as ComfyUI runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part, pad_to_patch, patchify, video_part
from ..base.s2v_tail import PACKED_FRAMES
from ..base.variant_shapes import PACKED, SOUND_LAYERS
from ..model.layers import Attention, BlockInputs, Linear, PatchEmbedding
from ..ops import pointwise
from ..quant.quantized import as_tensor
from .frames import CausalConvolution, CausalEncoder, Run, few_keys, runs_of
from .variant_model import VariantModel

_VIDEO, _SUBJECT, _SO_FAR = range(3)  # rows of the learned vectors that tell kinds of tokens apart
_ADAPTIVE_EPS = 1e-5


class MotionEncoder(CausalEncoder):
    """The sound's features to one token for each latent frame, and to several."""

    def __init__(self, config: WanConfig):
        dim, sound = config.dim, config.sound
        super().__init__(sound.features, (dim // 4, dim // 2, dim), sound.heads, dim)
        self.conv1_global = CausalConvolution(sound.features, dim // 4)
        self.final_linear = Linear(dim, dim)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, t, features] to [B, ceil(t/4), 1, dim] and [B, ceil(t/4), heads + 1, dim]."""
        whole = self.final_linear(self.encode(features, self.conv1_global, 1))
        return whole, self.padded(self.encode(features, self.conv1_local, self.heads))


class SoundEncoder(nn.Module):
    """The outputs of all layers of a sound encoder to tokens."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(1, config.sound.layers, 1, 1), requires_grad=False)
        self.encoder = MotionEncoder(config)

    def forward(self, sound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sound [B, layers, features, t] in float32; see `MotionEncoder`."""
        shares = F.silu(self.weights.float())
        mean = (sound * shares).sum(dim=1) / shares.sum()
        return self.encoder(mean.transpose(1, 2))


class Adaptive(nn.Module):
    """Shift and scale of a frame's tokens from the sound of that frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """whole [B, frames, 1, dim] to two of the same shape."""
        return self.linear(F.silu(whole)).chunk(2, dim=-1)


class SoundInjector(nn.Module):
    """What the video gets from the sound behind some blocks: cross-attention of a frame's tokens to its sound."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.injector = nn.ModuleList(Attention(config) for _ in SOUND_LAYERS)
        self.injector_adain_layers = nn.ModuleList(Adaptive(config.dim) for _ in SOUND_LAYERS)

    def forward(
        self,
        x: torch.Tensor,
        place: int,
        whole: torch.Tensor,
        tokens: torch.Tensor,
        runs: list[Run],
        inputs: BlockInputs,
    ) -> None:
        """Change x [B, n, dim] (float32) in place by the sound [B, frames, 1 and several, dim] of all frames."""
        attention, dtype = self.injector[place], inputs.compute_dtype
        shift, scale = self.injector_adain_layers[place](whole)
        sound = replace(inputs, context=tokens.flatten(1, 2).to(dtype))
        k, v = (y.unflatten(1, tokens.shape[1:3]) for y in attention.context_keys(sound)[0])
        for run in runs:
            y = pointwise.norm(run.of(x), 1 + run.own(scale), run.own(shift), _ADAPTIVE_EPS, dtype)
            y = attention.cross_attention(y, [(run.own(k), run.own(v))], few_keys)
            pointwise.add_(x[:, run.tokens], run.back(y))


class Packing(nn.Module):
    """A Conv3d (kernel = stride) of a stretch of the video so far."""

    def __init__(self, columns: int, rows: int, size: tuple[int, int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, *size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)

    def forward(self, stretch: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] to tokens [B, n, rows]."""
        weight = self.weight.to(stretch.dtype)
        return F.conv3d(stretch, weight, self.bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


class Kinds(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, dim), requires_grad=False)

    def forward(self, kind: int) -> torch.Tensor:
        """The vector [dim] of a kind of tokens, in float32."""
        return as_tensor(self.weight, torch.float32)[kind]


class SoundModel(VariantModel):
    """The DiT of S2V."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.trainable_cond_mask = Kinds(config.dim)
        self.casual_audio_encoder = SoundEncoder(config)
        self.cond_encoder = PatchEmbedding(config.sound.control_dim, config.dim)
        self.audio_injector = SoundInjector(config)
        packings = {name: Packing(config.in_dim, config.dim, size) for name, size in PACKED.items()}
        self.frame_packer = nn.ModuleDict(packings)

    def embed(self, tokens: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> torch.Tensor:
        x = self.patch_embedding(tokens.float()) + self.trainable_cond_mask(_VIDEO)
        if conditioning.control is not None:
            control = patchify(pad_to_patch(conditioning.control.to(x.device, torch.float32)))
            x += self.cond_encoder(control[:, video_part(grid, part)])
        if not isinstance(part, slice) or part.stop <= grid.video_tokens:
            return x
        behind = torch.cat(list(self._behind(conditioning, x.device)), dim=1)
        return torch.cat([x, behind[:, max(part.start - grid.video_tokens, 0) : part.stop - grid.video_tokens]], dim=1)

    def _behind(self, conditioning: Conditioning, device: torch.device) -> Iterator[torch.Tensor]:
        """The embedded tokens behind the video, [B, n, dim] each."""
        if conditioning.subject is not None:
            subject = patchify(conditioning.subject.to(device, torch.float32))
            yield self.patch_embedding(subject) + self.trainable_cond_mask(_SUBJECT)
        if conditioning.so_far is not None:
            frames = sum(PACKED_FRAMES)
            video = conditioning.so_far[:, :, -frames:].to(device, torch.float32)
            video = F.pad(video, (0, 0, 0, 0, frames - video.shape[2], 0))
            stretches = video.split(PACKED_FRAMES[::-1], dim=2)[::-1]
            for packing, stretch in zip(self.frame_packer.values(), stretches, strict=True):
                yield packing(stretch) + self.trainable_cond_mask(_SO_FAR)

    def times(
        self, timestep: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens behind the video have time 0.

        Where the number of a frame's tokens is odd, and there is a video so far, ComfyUI gives a few tokens at the end
        of a frame the time of the next one; so do we.
        """
        if not grid.tail:
            return super().times(timestep, grid, part, conditioning)
        subjects = 0 if conditioning.subject is None else conditioning.subject.shape[2]
        halves, packed = (1, 0) if conditioning.so_far is None else (2, 3)  # what is packed is as long as 1.5 frames
        length = -(-grid.tokens // ((grid.frames + subjects) * halves + packed))
        frame = torch.arange(grid.tokens, device=timestep.device)[part] // length // halves
        last = timestep.shape[1]
        return F.pad(timestep, (0, 1)), torch.where(frame < grid.frames, frame.clamp(max=last - 1), last)

    def side_streams(self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> list[Any]:
        """The sound of every frame, as one token and as several, and where this part's tokens lie in the frames."""
        if conditioning.audio is None:
            return []
        sound = conditioning.audio[..., : 4 * grid.frames]
        whole, tokens = conditioning.once(
            "sound", lambda: self.casual_audio_encoder(sound.to(x.device, torch.float32))
        )
        frames = tokens.shape[1]
        return [whole, tokens, runs_of(part, grid.video_tokens // frames, frames)]

    def add_sides(
        self, x: torch.Tensor, sides: list[Any], block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        if sides and block in SOUND_LAYERS:
            self.audio_injector(x, SOUND_LAYERS.index(block), *sides, inputs)
