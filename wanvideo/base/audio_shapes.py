"""Tensors of the variants that listen to audio, by name, and their sizes as a header tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .variant_shapes import MUSIC_LAYERS

Shape = tuple[int, ...]
Sizes = Callable[[str, int], int]
"""The size of a tensor along an axis; 0 where a file lacks it."""


@dataclass(frozen=True)
class HumoAudio:
    """HuMo's audio path: features of some audio frames around a latent frame become `tokens` tokens for it.

    Args:
        features: numbers of those audio frames together.
        hidden: width of the projection between.
        width: of an audio token.
    """

    features: int
    hidden: int
    width: int
    tokens: int

    def shapes(self, dim: int, layers: int) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        steps = ((self.features, self.hidden), (self.hidden, self.hidden), (self.hidden, self.tokens * self.width))
        for number, (columns, rows) in enumerate(steps, 1):
            found |= linear(f"audio_proj.audio_proj_glob_{number}.layer", columns, rows)
        found |= norm("audio_proj.audio_proj_glob_norm.layer", self.width)
        for i in range(layers):
            wrapper = f"blocks.{i}.audio_cross_attn_wrapper"
            found |= norm(f"{wrapper}.norm1_audio", dim)
            found |= attention(f"{wrapper}.audio_cross_attn", dim, self.width)
        return found

    @classmethod
    def told_by(cls, size: Sizes) -> HumoAudio | None:
        features, width = size("audio_proj.audio_proj_glob_1.layer.weight", 1), _width(size)
        if not (features and width):
            return None
        rows = size("audio_proj.audio_proj_glob_3.layer.weight", 0)
        return cls(features, size("audio_proj.audio_proj_glob_1.layer.weight", 0), width, rows // width)


def _width(size: Sizes) -> int:
    return size("audio_proj.audio_proj_glob_norm.layer.weight", 0)


@dataclass(frozen=True)
class DancerMusic:
    """WanDancer's music path: a small transformer over the features of the music, and what adds it to the tokens.

    Args:
        features: numbers of one moment of music.
        width, hidden, layers: of the transformer.
        injectors: blocks of the video behind which the music is added.
        image_dim: width of the CLIP tokens of the reference image.
    """

    features: int
    width: int
    hidden: int
    layers: int
    injectors: int
    image_dim: int

    def shapes(self, dim: int, in_dim: int, out_dim: int) -> dict[str, Shape]:
        found: dict[str, Shape] = {
            "patch_embedding_global.weight": (dim, in_dim, 1, 2, 2),
            "patch_embedding_global.bias": (dim,),
            "head_global.modulation": (1, 2, dim),
        }
        found |= linear("head_global.head", dim, 4 * out_dim)
        found |= linear("music_projection", self.features, self.width)
        for i in range(self.layers):
            layer = f"music_encoder.{i}"
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= linear(f"{layer}.self_attn.{projection}", self.width, self.width)
            found |= linear(f"{layer}.linear1", self.width, self.hidden) | linear(
                f"{layer}.linear2", self.hidden, self.width
            )
            found |= norm(f"{layer}.norm1", self.width) | norm(f"{layer}.norm2", self.width)
        for i in range(self.injectors):
            found |= attention(f"music_injector.injector.{i}", dim, dim)
        found |= norm("img_emb_refimage.proj.0", self.image_dim) | norm("img_emb_refimage.proj.4", dim)
        found |= linear("img_emb_refimage.proj.1", self.image_dim, self.image_dim)
        return found | linear("img_emb_refimage.proj.3", self.image_dim, dim)

    @classmethod
    def told_by(cls, size: Sizes) -> DancerMusic | None:
        if not size("patch_embedding_global.weight", 0):
            return None
        return cls(
            features=size("music_projection.weight", 1),
            width=size("music_projection.weight", 0),
            hidden=size("music_encoder.0.linear1.weight", 0),
            layers=_count(size, "music_encoder.{}.linear1.weight"),
            injectors=min(_count(size, "music_injector.injector.{}.q.weight"), len(MUSIC_LAYERS)),
            image_dim=size("img_emb_refimage.proj.1.weight", 1),
        )


@dataclass(frozen=True)
class TalkAudio:
    """InfiniteTalk's attention to speech in every block.

    Args:
        width: of an audio token.
        heads: of that attention, which no tensor tells: the released files have 40, and so has ComfyUI.
    """

    width: int
    heads: int = 40

    TOKENS = 32
    """That ComfyUI's projection makes of one speaker's speech for a frame."""

    def shapes(self, dim: int, layers: int) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        for i in range(layers):
            found |= norm(f"blocks.{i}.norm_x", dim)
            found |= linear(f"blocks.{i}.audio_cross_attn.q_linear", dim, dim)
            found |= linear(f"blocks.{i}.audio_cross_attn.kv_linear", self.width, 2 * dim)
            found |= linear(f"blocks.{i}.audio_cross_attn.proj", dim, dim)
        return found


def _count(size: Sizes, name: str) -> int:
    number = 0
    while size(name.format(number), 0):
        number += 1
    return number


def linear(name: str, columns: int, rows: int) -> Mapping[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> Mapping[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(name: str, dim: int, width: int) -> dict[str, Shape]:
    """An attention of the tokens to others of `width`."""
    found: dict[str, Shape] = {}
    for projection in "qkvo":
        found |= linear(f"{name}.{projection}", width if projection in "kv" else dim, dim)
    return found | {f"{name}.norm_q.weight": (dim,), f"{name}.norm_k.weight": (dim,)}
