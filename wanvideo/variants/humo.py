"""HuMo: each token also attends to the audio around its frame.

Source: HuMo `humo/models/wan_modules/model_humo.py` (Phantom-video/HuMo); shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..base.audio_shapes import HumoAudio
from ..base.config import WanConfig
from ..base.grid import Grid, Part
from ..model.layers import Attention, Block, BlockInputs, LayerNorm, Linear

NORM_EPS = 1e-5  # of the audio projection, as torch's default


@dataclass(frozen=True)
class Heard:
    """What the tokens of one rank hear.

    Args:
        audio: [B, moments, tokens, width].
        runs: (first token, last + 1, moment), in the order of the rank's tokens.
    """

    audio: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]


def moments(grid: Grid, part: Part, count: int) -> tuple[tuple[int, int, int], ...]:
    """Which of `count` equal stretches of a sequence the tokens `part` lie in: (first, last + 1, stretch)."""
    places = part.cpu() if isinstance(part, torch.Tensor) else torch.arange(grid.tokens)[part]
    stretches, lengths = torch.unique_consecutive(places * count // grid.tokens, return_counts=True)
    stops = lengths.cumsum(0)
    return tuple(zip((stops - lengths).tolist(), stops.tolist(), stretches.tolist(), strict=True))


class Layer(nn.Module):
    """The released files call each part of the projection `<name>.layer`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


class AudioProjection(nn.Module):
    """Audio features [B, frames, ...] of each latent frame to audio tokens [B, frames, tokens, width]."""

    def __init__(self, audio: HumoAudio):
        super().__init__()
        self.audio = audio
        self.audio_proj_glob_1 = Layer(Linear(audio.features, audio.hidden))
        self.audio_proj_glob_2 = Layer(Linear(audio.hidden, audio.hidden))
        self.audio_proj_glob_3 = Layer(Linear(audio.hidden, audio.tokens * audio.width))
        self.audio_proj_glob_norm = Layer(LayerNorm(audio.width, NORM_EPS))

    def forward(self, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = features.flatten(2).to(dtype)
        x = F.relu(self.audio_proj_glob_1.layer(x))
        x = F.relu(self.audio_proj_glob_2.layer(x))
        x = self.audio_proj_glob_3.layer(x).unflatten(-1, (self.audio.tokens, self.audio.width))
        return self.audio_proj_glob_norm.layer(x.flatten(1, 2).float(), dtype).view(x.shape)


class AudioAttention(Attention):
    """Attention to audio tokens, whose width is another than the model's."""

    def __init__(self, config: WanConfig, width: int):
        super().__init__(config)
        self.k, self.v = Linear(width, config.dim), Linear(width, config.dim)

    def forward(self, x: torch.Tensor, heard: Heard, inputs: BlockInputs) -> torch.Tensor:
        """x [B, n, dim], normed, whose first token is that of the first run."""
        first, last = heard.runs[0][2], heard.runs[-1][2]
        audio = heard.audio[:, first : last + 1]
        q, k = self.q(x), self.k(audio.flatten(1, 2))
        squares_q, squares_k = self.mean_squares(q, k)
        q = self.by_head(self.norm_q(q, None, squares_q))
        k = self.by_head(self.norm_k(k, None, squares_k)).unflatten(1, audio.shape[1:3])
        v = self.by_head(self.v(audio))
        out = [inputs.kernel(q[:, a:b], k[:, m - first], v[:, m - first]) for a, b, m in heard.runs]
        return self.o(torch.cat(out, dim=1).flatten(2))


class AudioWrapper(nn.Module):
    def __init__(self, config: WanConfig, width: int):
        super().__init__()
        self.norm1_audio = LayerNorm(config.dim, config.eps)
        self.audio_cross_attn = AudioAttention(config, width)


class HumoBlock(Block):
    """A block with an attention to audio between cross-attention and feed-forward."""

    def __init__(self, config: WanConfig, image: bool = False):
        super().__init__(config, image)
        self.audio_cross_attn_wrapper = AudioWrapper(config, config.humo.width)

    def used_by_slices(self) -> list[nn.Module]:
        return [*super().used_by_slices(), *self.audio_cross_attn_wrapper.audio_cross_attn.linears()]

    def between(self, x: torch.Tensor, s: slice, inputs: BlockInputs) -> None:
        if inputs.heard is None or not x.shape[1]:
            return
        wrapper = self.audio_cross_attn_wrapper
        cut = ((max(a, s.start) - s.start, min(b, s.stop) - s.start, m) for a, b, m in inputs.heard.runs)
        runs = tuple(run for run in cut if run[0] < run[1])
        y = wrapper.norm1_audio(x, inputs.compute_dtype)
        x += wrapper.audio_cross_attn(y, Heard(inputs.heard.audio, runs), inputs)
