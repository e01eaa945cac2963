"""HuMo: each token also attends to the audio around its frame; a reference image is a frame behind the video.

Source: HuMo `humo/models/wan_modules/model_humo.py` (Phantom-video/HuMo); shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part
from ..base.shapes import Shapes, attention, linear, norm
from ..base.user_error import InputError
from ..base.variant import Asked, Input, Key, Shape, SideAttention, TensorShapes, Variant, attention_splits
from ..model.layers import Attention, Block, BlockInputs, LayerNorm, Linear
from ..model.model import WanModel

NORM_EPS = 1e-5  # of the audio projection, as torch's default
_PROJECTION = "audio_proj.audio_proj_glob"


def _audio_shape(_: Humo, asked: Asked) -> Shape:
    """The shape of the audio: the batch size, then any sizes, as `Humo.check` counts the numbers of a frame."""
    audio = asked.given.audio
    return (asked.batch, *(None for _ in range(audio.ndim - 1 if audio is not None else 1)))


@dataclass(frozen=True)
class Humo(Variant):
    """HuMo: features of some audio frames around a latent frame become `tokens` tokens for the frame.

    Args:
        features: numbers of all audio frames around one latent frame together.
        hidden: width of the hidden layers of the projection from features to tokens.
        width: numbers of an audio token.
    """

    features: int
    hidden: int
    width: int
    tokens: int

    name = "HuMo"
    order = 40
    comfyui_names = ("humo",)
    node = "WanHuMoImageToVideo"
    inputs = (Input("audio", _audio_shape, Key("audio_embed", "an audio embedding", "WanHuMoImageToVideo")),)
    settings = (Key("reference_latent"),)
    ignored = ("clip_fea",)
    start_image = False
    splits = attention_splits("audio_cross_attn")

    @classmethod
    def read(cls, tensors: TensorShapes) -> Humo | None:
        """The dimensions of a file with HuMo's projection of audio; None for a file without."""
        features = tensors.size(f"{_PROJECTION}_1.layer.weight", 1)
        width = tensors.size(f"{_PROJECTION}_norm.layer.weight", 0)
        if not (features and width):
            return None
        rows = tensors.size(f"{_PROJECTION}_3.layer.weight", 0)
        return cls(features, tensors.size(f"{_PROJECTION}_1.layer.weight", 0), width, rows // width)

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the projection, and of the attention to audio in each block."""
        shapes: Shapes = {}
        steps = ((self.features, self.hidden), (self.hidden, self.hidden), (self.hidden, self.tokens * self.width))
        for number, (columns, rows) in enumerate(steps, 1):
            shapes |= linear(f"{_PROJECTION}_{number}.layer", columns, rows)
        shapes |= norm(f"{_PROJECTION}_norm.layer", self.width)
        for i in range(config.num_layers):
            wrapper = f"blocks.{i}.audio_cross_attn_wrapper"
            shapes |= norm(f"{wrapper}.norm1_audio", config.dim)
            shapes |= attention(f"{wrapper}.audio_cross_attn", config.dim, self.width)
        return shapes

    def layers(self) -> type[HumoModel]:
        """`HumoModel`."""
        return HumoModel

    def side_attention(self, config: WanConfig) -> SideAttention:
        """The attention to the tokens of a frame's audio, in every block."""
        return SideAttention(1.0, self.tokens, self.width)

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with the reference image as a frame behind the video, and with silence for this frame."""
        frames, audio = given.get("reference_latent"), conditioning.audio
        if frames is None:
            return conditioning
        if audio is not None:
            audio = torch.cat([audio, audio.new_zeros(audio.shape[0], frames.shape[2], *audio.shape[2:])], dim=1)
        return conditioning.having(extra_frames=frames, audio=audio)

    def check(self, config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Check that the audio of a frame has as many numbers as the projection takes.

        Raises:
            InputError: the audio has another number.
        """
        audio = conditioning.audio
        if audio is not None and audio[0, 0].numel() != self.features:
            raise InputError(
                f"The audio embedding has {audio[0, 0].numel()} numbers for each latent frame, but this HuMo "
                f"model takes {self.features}. Use the audio encoder that WanHuMoImageToVideo is made for."
            )


@dataclass(frozen=True)
class AudioContext:
    """The audio to which the video tokens of one rank attend.

    Args:
        audio: audio tokens [B, moments, tokens, width].
        runs: (first video token, last + 1, moment) of each run of video tokens, in the order of the rank's tokens.
    """

    audio: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]


def moments(grid: Grid, part: Part, count: int) -> tuple[tuple[int, int, int], ...]:
    """The runs (first, last + 1, stretch) of the tokens `part`, for a sequence cut into `count` equal stretches."""
    places = part.cpu() if isinstance(part, torch.Tensor) else torch.arange(grid.tokens)[part]
    stretches, lengths = torch.unique_consecutive(places * count // grid.tokens, return_counts=True)
    stops = lengths.cumsum(0)
    return tuple(zip((stops - lengths).tolist(), stops.tolist(), stretches.tolist(), strict=True))


class Layer(nn.Module):
    """A layer under the name `layer`, as each part of the projection is called in the released files."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


class AudioProjection(nn.Module):
    """The projection from audio features [B, frames, ...] of latent frames to tokens [B, frames, tokens, width]."""

    def __init__(self, audio: Humo):
        super().__init__()
        self.audio = audio
        self.audio_proj_glob_1 = Layer(Linear(audio.features, audio.hidden))
        self.audio_proj_glob_2 = Layer(Linear(audio.hidden, audio.hidden))
        self.audio_proj_glob_3 = Layer(Linear(audio.hidden, audio.tokens * audio.width))
        self.audio_proj_glob_norm = Layer(LayerNorm(audio.width, NORM_EPS))

    def forward(self, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Features [B, frames, ...] to tokens [B, frames, tokens, width] in `dtype`."""
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

    def forward(self, x: torch.Tensor, audio_context: AudioContext, inputs: BlockInputs) -> torch.Tensor:
        """Attend from the normed tokens x [B, n, dim] to the audio; x begins with the tokens of the first run."""
        first, last = audio_context.runs[0][2], audio_context.runs[-1][2]
        audio = audio_context.audio[:, first : last + 1]
        q, k = self.q(x), self.k(audio.flatten(1, 2))
        squares_q, squares_k = self.mean_squares(q, k)
        q = self.by_head(self.norm_q(q, None, squares_q))
        k = self.by_head(self.norm_k(k, None, squares_k)).unflatten(1, audio.shape[1:3])
        v = self.by_head(self.v(audio))
        out = [inputs.kernel(q[:, a:b], k[:, m - first], v[:, m - first]) for a, b, m in audio_context.runs]
        return self.o(torch.cat(out, dim=1).flatten(2))


class AudioWrapper(nn.Module):
    """The norm and the attention of a block's audio, as the released files group them."""

    def __init__(self, config: WanConfig, width: int):
        super().__init__()
        self.norm1_audio = LayerNorm(config.dim, config.eps)
        self.audio_cross_attn = AudioAttention(config, width)


class HumoBlock(Block):
    """A block with an attention to audio between cross-attention and feed-forward."""

    def __init__(self, config: WanConfig, image: bool = False):
        super().__init__(config, image)
        self.audio_cross_attn_wrapper = AudioWrapper(config, config[Humo].width)

    def used_by_slices(self) -> list[nn.Module]:
        """The modules that each slice of tokens goes through, those of the attention to audio included."""
        return [*super().used_by_slices(), *self.audio_cross_attn_wrapper.audio_cross_attn.linears()]

    def between(self, x: torch.Tensor, s: slice, inputs: BlockInputs) -> None:
        """Add the attention to audio to x, the slice `s` of this rank's tokens, in place."""
        if inputs.audio_context is None or not x.shape[1]:
            return
        wrapper = self.audio_cross_attn_wrapper
        cut = ((max(a, s.start) - s.start, min(b, s.stop) - s.start, m) for a, b, m in inputs.audio_context.runs)
        runs = tuple(run for run in cut if run[0] < run[1])
        y = wrapper.norm1_audio(x, inputs.compute_dtype)
        x += wrapper.audio_cross_attn(y, AudioContext(inputs.audio_context.audio, runs), inputs)


class HumoModel(WanModel):
    """The DiT of HuMo."""

    block = HumoBlock

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.audio_proj = AudioProjection(config[Humo])

    def audio_context(
        self, grid: Grid, part: Part, conditioning: Conditioning, device: torch.device
    ) -> AudioContext | None:
        """The audio tokens of all frames, and the runs of the video tokens `part` by frame; None without audio."""
        if conditioning.audio is None:
            return None
        audio = self.audio_proj(conditioning.audio.to(device), self.compute_dtype)
        return AudioContext(audio, moments(grid, part, audio.shape[1]))
