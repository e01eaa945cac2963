"""WanDancer: music is added to the tokens behind some of the blocks.

The attention to the music has one key for each stretch of tokens. So its result is the value of this key, whatever the
query: a vector for each stretch, which the injector of each block computes once.

The model makes a coarse video at less than 30 frames a second with an embedding, a head and positions that only coarse
videos use. It fills the coarse video in at 30 frames a second with the usual embedding, head and positions.

Source: Wan-Dancer as ComfyUI runs it (`comfy/ldm/wan/model_wandancer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part
from ..base.shapes import Shapes, attention, image_embedding, linear, norm, patch_embedding
from ..base.variant import Input, Key, TensorShapes, Variant, attention_splits
from ..model.embeddings import ImageEmbedding
from ..model.layers import Attention, BlockInputs, Head, LayerNorm, Linear, PatchEmbedding
from ..model.model import Sides, WanModel
from ..ops.rope import FULL_RATE, THETA, apply_rope

HEADS = 4  # of the music's transformer; nothing in a file tells it
NORM_EPS = 1e-5
PER_FRAME = 8  # stretches of tokens in a latent frame, each with a moment of music
_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27)  # blocks of the video behind which music is added


@dataclass(frozen=True)
class WanDancer(Variant):
    """WanDancer: a small transformer over the features of the music, and injectors that add the music to the tokens.

    Args:
        features: numbers of one moment of music.
        width, hidden, encoder_layers: width, feed-forward width and number of layers of the transformer.
        injectors: blocks of the video behind which the music is added.
        image_dim: width of the CLIP tokens of the reference image.
    """

    features: int
    width: int
    hidden: int
    encoder_layers: int
    injectors: int
    image_dim: int

    name = "WanDancer"
    order = 50
    comfyui_names = ("wandancer",)
    node = "WanDancerVideo"
    inputs = (
        Input(
            "audio",
            lambda own, asked: (asked.batch, None, own.features),
            Key("audio_embed", "an audio embedding", "WanDancerVideo"),
        ),
        Input(
            "image_ref",
            lambda own, asked: (asked.batch, None, own.image_dim),
            Key("clip_fea_ref", "a CLIP vision embedding of a reference image", "WanDancerVideo"),
        ),
    )
    settings = (
        Key("fps", "a frame rate", "WanDancerVideo"),
        Key("audio_inject_scale", "a strength of music", "WanDancerVideo"),
    )
    ignored = ("clip_fea",)
    splits = attention_splits(r"music_injector\.injector\.\d+")
    first_stage = frozenset({"patch_embedding_global"})
    last_stage = frozenset({"head_global"})

    @classmethod
    def read(cls, tensors: TensorShapes) -> WanDancer | None:
        """The dimensions of a file with an embedding for coarse videos; None for a file without."""
        size = tensors.size
        if not size("patch_embedding_global.weight", 0):
            return None
        return cls(
            features=size("music_projection.weight", 1),
            width=size("music_projection.weight", 0),
            hidden=size("music_encoder.0.linear1.weight", 0),
            encoder_layers=tensors.count("music_encoder.{}.linear1.weight"),
            injectors=min(tensors.count("music_injector.injector.{}.q.weight"), len(_LAYERS)),
            image_dim=size("img_emb_refimage.proj.1.weight", 1),
        )

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors for coarse videos, of the music's transformer and injectors, and of the reference image."""
        dim = config.dim
        shapes = patch_embedding("patch_embedding_global", config.in_dim, dim)
        shapes["head_global.modulation"] = (1, 2, dim)
        shapes |= linear("head_global.head", dim, 4 * config.out_dim)
        shapes |= linear("music_projection", self.features, self.width)
        for i in range(self.encoder_layers):
            layer = f"music_encoder.{i}"
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{layer}.self_attn.{projection}", self.width, self.width)
            shapes |= linear(f"{layer}.linear1", self.width, self.hidden)
            shapes |= linear(f"{layer}.linear2", self.hidden, self.width)
            shapes |= norm(f"{layer}.norm1", self.width) | norm(f"{layer}.norm2", self.width)
        for i in range(self.injectors):
            shapes |= attention(f"music_injector.injector.{i}", dim, dim)
        return shapes | image_embedding("img_emb_refimage", self.image_dim, dim)

    def layers(self) -> type[WanDancerModel]:
        """`WanDancerModel`."""
        return WanDancerModel

    def block_number(self, config: WanConfig, name: str) -> int | None:
        """The number of the block behind which the injector with the tensor `name` acts; None for other tensors."""
        part = name.split(".")
        return _LAYERS[int(part[2])] if part[0] == "music_injector" else None

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with the frame rate of a coarse video, and with the strength of the music."""
        fps, scale = (
            default if given.get(name) is None else float(given[name])
            for name, default in (("fps", FULL_RATE), ("audio_inject_scale", 1.0))
        )
        coarse = 0.0 if int(fps + 0.5) == FULL_RATE else fps
        return conditioning.having(replace(conditioning.options, fps=coarse, audio_scale=scale))


class MusicAttention(nn.Module):
    """Self-attention between the moments of music."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """x [B, moments, width] and rotations [moments, head_dim/2] to the shape of x."""
        q, k, v = (project(x).unflatten(-1, (HEADS, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MusicLayer(nn.Module):
    """A layer of the music's transformer: self-attention and feed-forward, each behind a norm."""

    def __init__(self, music: WanDancer):
        super().__init__()
        self.self_attn = MusicAttention(music.width)
        self.linear1, self.linear2 = Linear(music.width, music.hidden), Linear(music.hidden, music.width)
        self.norm1, self.norm2 = LayerNorm(music.width, NORM_EPS), LayerNorm(music.width, NORM_EPS)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """x [B, moments, width] and rotations [moments, head_dim/2] to the shape of x."""
        x = x + self.self_attn(self.norm1(x, x.dtype), rope)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x, x.dtype))))


class MusicInjector(nn.Module):
    """An attention for each of the video's blocks that music is added behind; only values and outputs are used."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.injector = nn.ModuleList(Attention(config) for _ in range(config[WanDancer].injectors))


def encode_music(
    features: torch.Tensor, projection: Linear, layers: nn.ModuleList, grid: Grid, dim: int
) -> torch.Tensor:
    """Encode music features [B, moments, features] as float32 [B, frames * PER_FRAME, dim] for latent frames."""
    x = projection(features.float())
    pairs = x.shape[-1] // HEADS // 2
    frequencies = THETA ** -(torch.arange(pairs, dtype=torch.float64, device=x.device) / pairs)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64, device=x.device), frequencies)
    rope = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    for layer in layers:
        x = layer(x, rope)
    return F.interpolate(x.unsqueeze(1), (grid.frames * PER_FRAME, dim), mode="bilinear").squeeze(1)


def add_music(
    x: torch.Tensor, music: torch.Tensor, places: torch.Tensor, injector: Attention, scale: float, dtype: torch.dtype
) -> None:
    """Add to each token of x [B, n, dim] in place the music [B, moments, dim] of the token's moment, `places` [n]."""
    added = injector.o(injector.v(music.to(dtype))).float()
    x += scale * added[:, places]


def moment_of(grid: Grid, part: Part, device: torch.device) -> torch.Tensor:
    """The moment of music, int64 [n], that is added to each token of `part`."""
    return torch.arange(grid.tokens, device=device)[part] * (grid.frames * PER_FRAME) // grid.tokens


class WanDancerModel(WanModel):
    """The DiT of WanDancer."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        music = config[WanDancer]
        self.img_emb_refimage = ImageEmbedding(music.image_dim, config.dim)
        self.patch_embedding_global = PatchEmbedding(config.in_dim, config.dim)
        self.head_global = Head(config)
        self.music_projection = Linear(music.features, music.width)
        self.music_encoder = nn.ModuleList(MusicLayer(music) for _ in range(music.encoder_layers))
        self.music_injector = MusicInjector(config)

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens `video` by the embedding for coarse videos, or by the usual embedding."""
        if conditioning.options.fps:
            return self.patch_embedding_global(tokens.float())
        return super().embed_video(tokens, grid, video, conditioning)

    def head_for(self, conditioning: Conditioning) -> Head:
        """The head for coarse videos, or the usual head."""
        return self.head_global if conditioning.options.fps else super().head_for(conditioning)

    def image_context(self, conditioning: Conditioning, text: torch.Tensor) -> torch.Tensor | None:
        """The tokens of the reference image, then those of the start image; no tokens without any image."""
        if not self.config.image_dim:
            return None
        given = ((self.img_emb_refimage, conditioning.image_ref), (self.img_emb, conditioning.image))
        images = [embed(image.to(text.device), self.compute_dtype) for embed, image in given if image is not None]
        return torch.cat([text[:, :0], *images], dim=1)

    def side_streams(
        self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning, carried: list[torch.Tensor]
    ) -> Sides:
        """The encoded music, and the moment of music of each token."""
        sides = super().side_streams(x, grid, part, conditioning, carried)
        if conditioning.audio is None:
            return sides
        audio = conditioning.audio.to(x.device)
        music = encode_music(audio, self.music_projection, self.music_encoder, grid, self.config.dim)
        return sides | {"music": (music, moment_of(grid, part, x.device))}

    def add_sides(
        self, x: torch.Tensor, sides: Sides, block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        """Add the music to the tokens x behind some blocks."""
        super().add_sides(x, sides, block, inputs, conditioning)
        if "music" in sides and block in _LAYERS:
            injector = cast(Attention, self.music_injector.injector[_LAYERS.index(block)])
            music, moments = sides["music"]
            add_music(x, music, moments, injector, conditioning.options.audio_scale, inputs.compute_dtype)
