"""VACE: control videos go through blocks of their own, whose output is added to the tokens behind every few blocks.

The layers are in the file of a whole model, or in one beside a text-to-video model (see checkpoint/vace_module.py).

Source: Wan 2.1 `wan/modules/vace_model.py`; shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..base.conditioning import Conditioning, check_no_subjects
from ..base.config import WanConfig
from ..base.grid import Grid, Part, frames_of, pad_to_patch, patchify
from ..base.shapes import Shapes, block, linear, patch_embedding
from ..base.variant import Input, Key, TensorShapes, Variant
from ..model.layers import Block, BlockInputs, Linear, PatchEmbedding
from ..model.model import Sides, WanModel

_BLOCK = re.compile(r"vace_blocks\.(\d+)\.(before_proj)?")
_STREAM_BYTES = 4  # of a number of a control stream, float32


@dataclass(frozen=True)
class Vace(Variant):
    """The dimensions of VACE's layers.

    Args:
        blocks: number of blocks for the control videos, spread evenly over the blocks of the video.
        channels: channels of a control video with its masks.
    """

    blocks: int
    channels: int

    name = "VACE"
    order = 70
    comfyui_names = ("vace",)
    node = "WanVaceToVideo"
    inputs = (
        Input(
            "vace",
            lambda own, asked: (
                *(asked.batch, len(asked.given.options.vace_strengths), own.channels),
                *(asked.frames, asked.height, asked.width),
            ),
            Key("vace_context", "a VACE control video", "WanVaceToVideo"),
        ),
    )
    settings = (Key("vace_strength", "the strength of a VACE control video", "WanVaceToVideo"),)
    first_stage = frozenset({"vace_patch_embedding"})
    carried = 1
    why_exact = "VACE's blocks attend to tokens of their own, for which there are no buffers"

    @classmethod
    def read(cls, tensors: TensorShapes) -> Vace | None:
        """The variant with the number of VACE blocks and the control video's channels; None without VACE blocks."""
        blocks = tensors.blocks("vace_blocks")
        return cls(blocks, tensors.size("vace_patch_embedding.weight", 1)) if blocks else None

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the embedding and of the blocks."""
        dim = config.dim
        shapes = patch_embedding("vace_patch_embedding", self.channels, dim)
        shapes |= linear("vace_blocks.0.before_proj", dim, dim)
        for i in range(self.blocks):
            shapes |= block(f"vace_blocks.{i}", dim, config.ffn_dim)
            shapes |= linear(f"vace_blocks.{i}.after_proj", dim, dim)
        return shapes

    def layers(self) -> type[VaceModel]:
        """`VaceModel`."""
        return VaceModel

    def divides(self, config: WanConfig) -> bool:
        """Whether the VACE blocks can be spread evenly over the blocks of the video."""
        return config.num_layers % self.blocks == 0

    def stride(self, config: WanConfig) -> int:
        """Blocks of the video from one VACE block to the next."""
        return config.num_layers // self.blocks

    def side_blocks(self, config: WanConfig, blocks: range) -> range:
        """The VACE blocks that run behind these blocks of the video."""
        stride = self.stride(config)
        return range(*(-(-number // stride) for number in (blocks.start, blocks.stop)))

    def block_number(self, config: WanConfig, name: str) -> int | None:
        """The number of the VACE block of the tensor `name`; None for `before_proj`, which runs before any block."""
        match = _BLOCK.match(name)
        return None if match is None or match[2] else config.num_layers + int(match[1])

    def video_block_number(self, config: WanConfig, name: str) -> int | None:
        """The number of the block of the video behind which the VACE block of the tensor `name` runs."""
        match = _BLOCK.match(name)
        return int(match[1]) * self.stride(config) if match else None

    def token_bytes(self, contexts: int) -> int:
        """Bytes of the control streams beside the video's residual stream."""
        return contexts * _STREAM_BYTES

    def arrange(self, conditioning: Conditioning, given: Mapping[str, Any]) -> Conditioning:
        """The conditioning with the strength of each control video."""
        strengths = tuple(float(strength) for strength in given.get("vace_strength") or ())
        return conditioning.having(replace(conditioning.options, vace_strengths=strengths))

    def check(self, config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Check that the conditioning has no extra frames, as control videos have none.

        Raises:
            ValueError: the conditioning has extra frames.
        """
        if conditioning.vace is not None:
            check_no_subjects(conditioning)


class VaceBlock(Block):
    """A block for the tokens of a control video; `after_proj` of its output is added to the tokens of the video."""

    def __init__(self, config: WanConfig, first: bool):
        super().__init__(config, image=False)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)


class VaceModel(WanModel):
    """A DiT with the blocks of VACE."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        vace = config[Vace]
        self.vace_stride = vace.stride(config)
        self.vace_patch_embedding = PatchEmbedding(vace.channels, config.dim)
        self.vace_blocks = nn.ModuleList(VaceBlock(config, first=i == 0) for i in range(vace.blocks))

    def side_streams(
        self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning, carried: list[torch.Tensor]
    ) -> Sides:
        """One stream for each control video; a later pipeline stage takes over the `carried` streams."""
        sides = super().side_streams(x, grid, part, conditioning, carried)
        sides["vace"] = carried
        if conditioning.vace is None or self.span.start:
            return sides
        window, own = frames_of(grid, part)
        first = cast(VaceBlock, self.vace_blocks[0]).before_proj
        sides["vace"] = []
        for video in conditioning.vace[:, :, :, window].unbind(1):
            tokens = patchify(pad_to_patch(video.to(x.device, torch.float32)))[:, own]
            embedded = self.vace_patch_embedding(tokens)
            sides["vace"].append(x + first(embedded.to(self.compute_dtype)))
        return sides

    def add_sides(
        self, x: torch.Tensor, sides: Sides, block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        """Run, behind every few blocks, the next VACE block on each stream, and add its output to x."""
        super().add_sides(x, sides, block, inputs, conditioning)
        if not sides["vace"] or block % self.vace_stride:
            return
        vace = cast(VaceBlock, self.vace_blocks[block // self.vace_stride])
        for stream, strength in zip(sides["vace"], conditioning.options.vace_strengths, strict=True):
            vace(stream, inputs)
            x.add_(vace.after_proj(stream.to(inputs.compute_dtype)), alpha=strength)

    def carried(self, block: int, conditioning: Conditioning) -> int:
        """The number of control videos while a VACE block is still to come; then 0."""
        to_come = self.config.side_blocks(range(block, self.config.num_layers))
        return len(conditioning.options.vace_strengths) if to_come and conditioning.vace is not None else 0

    def onward(self, sides: Sides) -> list[torch.Tensor]:
        """The streams of the control videos."""
        return sides["vace"]

    def self_attentions(self, conditioning: Conditioning, blocks: range) -> int:
        """The number of self-attentions in the video's blocks and, for each control video, in the VACE blocks."""
        contexts = 0 if conditioning.vace is None else len(conditioning.options.vace_strengths)
        return super().self_attentions(conditioning, blocks) + contexts * len(self.config.side_blocks(blocks))
