"""The dimensions of a Wan DiT, and those of the released sizes; checkpoint/header.py reads a file's dimensions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .shapes import Shapes, block, image_embedding, linear, patch_embedding
from .tensor_info import elements
from .variant import CONTEXT_VIDEOS, EXTRA_FRAMES, IMAGE, Input, SideAttention, V, Variant, by_channels

BLOCK_NAME = re.compile(r"blocks\.(\d+)\.")
"""The beginning of the name of each tensor in a block of the video."""


@dataclass(frozen=True)
class WanConfig:
    """Dimensions of a Wan DiT, named as in Wan 2.1's `wan/modules/model.py`.

    Args:
        in_dim: channels of the latent and of the tensors concatenated to it (a start image, its mask, a control video).
        out_dim: channels of the latent.
        image_dim: width of the CLIP tokens of the start image; 0 for a model that attends to none.
        image_positions: CLIP tokens with a learned position, where there is a last image too; else 0.
        additions: the variants whose layers the model has beside its blocks, by their order (see `having`).
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int = 0
    image_positions: int = 0
    additions: tuple[Variant, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.num_heads

    def having(self, *variants: Variant, **changes: Any) -> WanConfig:
        """These dimensions with `changes`, and with `variants` added; each replaces the dimensions that the
        configuration had for the same variant."""
        kept = (variant for variant in self.additions if type(variant) not in map(type, variants))
        additions = sorted((*kept, *variants), key=lambda variant: (variant.order, type(variant).__name__))
        return replace(self, additions=tuple(additions), **changes)

    # The variants of the model.

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that the model is: those whose layers the model has, and, if none of these has a name, the
        variant that the numbers of channels make."""
        if any(variant.name for variant in self.additions):
            return self.additions
        return (*self.additions, by_channels(self.in_dim, self.out_dim))

    @property
    def kind(self) -> Variant:
        """The variant whose name users call the model by."""
        return [variant for variant in self.variants if variant.name][-1]

    @property
    def variant(self) -> str:
        """The name by which users call the model, such as image-to-video."""
        return self.kind.name

    def get(self, variant: type[V]) -> V | None:
        """The dimensions of the layers of a variant; None where the model has no such layers."""
        return next((own for own in self.additions if type(own) is variant), None)

    def __getitem__(self, variant: type[V]) -> V:
        """The dimensions of the layers of a variant that the model has.

        Raises:
            KeyError: the model has no layers of this variant.
        """
        found = self.get(variant)
        if found is None:
            raise KeyError(variant)
        return found

    @property
    def inputs(self) -> list[tuple[Variant, Input]]:
        """The tensors that the model takes beside latent, timestep and text, each with the variant that has its
        dimensions."""
        shared = [EXTRA_FRAMES]
        if self.image_dim:
            shared.append(IMAGE)
        if self.context_channels:
            shared.append(CONTEXT_VIDEOS)
        return [(self.kind, given) for given in shared] + [(v, given) for v in self.variants for given in v.inputs]

    @property
    def context_channels(self) -> tuple[int, ...]:
        """The numbers of channels that context videos may have, masks beside them included."""
        return tuple(channels for variant in self.variants for channels in variant.context_channels(self))

    @property
    def side_attention(self) -> SideAttention:
        """The model's attention to a few further tokens of each frame, such as its speech, its audio or a face."""
        found = (variant.side_attention(self) for variant in self.variants)
        return next((side_attention for side_attention in found if side_attention.tokens), SideAttention())

    @property
    def carried(self) -> int:
        """How many streams of tokens go from one pipeline stage to the next beside the video's stream."""
        return sum(variant.carried for variant in self.variants)

    @property
    def why_exact(self) -> str:
        """The reason why displaced patches (DistriFusion) cannot run the model, which is then computed exactly; ""
        where displaced patches can run the model."""
        return next((variant.why_exact for variant in self.variants if variant.why_exact), "")

    def token_bytes(self, contexts: int) -> int:
        """Bytes of activations for each token and channel that this model needs beyond a text-to-video model.

        Args:
            contexts: how many control videos the forward has.
        """
        return sum(variant.token_bytes(contexts) for variant in self.variants)

    # The blocks of the model.

    def side_blocks(self, blocks: range) -> range:
        """The numbers, counted from 0, of the variant's own blocks that run behind these `blocks` of the video."""
        found = (variant.side_blocks(self, blocks) for variant in self.variants)
        return next(filter(None, found), range(0))

    def run_order(self, blocks: range) -> list[int]:
        """The numbers of `blocks` of the video and of the side blocks behind them, in the order in which these run.

        The number of a side block is `num_layers` plus its number in `side_blocks`.
        """
        order: list[int] = []
        for number in blocks:
            order += [number, *(self.num_layers + i for i in self.side_blocks(range(number, number + 1)))]
        return order

    def block_number(self, name: str) -> int | None:
        """The number, counted as in `run_order`, of the block that the tensor `name` belongs to, or of the block
        directly behind which the tensor acts; None for a tensor that acts at no block."""
        if match := BLOCK_NAME.match(name):
            return int(match[1])
        return _first(variant.block_number(self, name) for variant in self.variants)

    def video_block_number(self, name: str) -> int | None:
        """The number of the one block of the video that the tensor `name` belongs to or acts at; None for a tensor that
        acts at no block."""
        if match := BLOCK_NAME.match(name):
            return int(match[1])
        return _first(variant.video_block_number(self, name) for variant in self.variants)

    # The tensors of the model.

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(elements(shape) for shape in self.shapes().values())

    def shapes(self) -> Shapes:
        """The name and shape of every tensor of the state dict, in the original key names."""
        d = self.dim
        shapes = patch_embedding("patch_embedding", self.in_dim, d)
        shapes["head.modulation"] = (1, 2, d)
        shapes |= linear("text_embedding.0", self.text_dim, d) | linear("text_embedding.2", d, d)
        shapes |= linear("time_embedding.0", self.freq_dim, d) | linear("time_embedding.2", d, d)
        shapes |= linear("time_projection.1", d, 6 * d)
        for i in range(self.num_layers):
            shapes |= block(f"blocks.{i}", d, self.ffn_dim, image=bool(self.image_dim))
        shapes |= linear("head.head", d, 4 * self.out_dim)
        if self.image_dim:
            shapes |= image_embedding("img_emb", self.image_dim, d)
        if self.image_positions:
            shapes["img_emb.emb_pos"] = (1, self.image_positions, self.image_dim)
        for variant in self.variants:
            shapes |= variant.shapes(self)
        return shapes


def _first(numbers: Iterable[int | None]) -> int | None:
    return next((number for number in numbers if number is not None), None)


PRESETS = {
    "1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    "14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
