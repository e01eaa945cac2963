"""The Wan DiT on one device, made of the layers in layers.py; layers of single variants are in wanvideo/variants/.

Only self-attention mixes tokens. Everything else works on any subset of the tokens. The parallel strategies build on
this: they hand `WanModel.transform` a part of the tokens and an attention that sees the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from ..attention.kernels import AttentionKernel, get_kernel
from ..base.conditioning import NOTHING, Conditioning, core, extended
from ..base.config import WanConfig
from ..base.grid import Grid, Part, pad_to_patch, patchify, sequence_of, unpatchify, video_part
from ..checkpoint.weight_source import cast_and_move, open_weights
from ..ops import pointwise
from ..ops.rope import sequence_table
from ..quant.quantized import QuantizedWeight, Weight
from .embeddings import ImageEmbedding
from .layers import (
    Block,
    BlockInputs,
    Head,
    Linear,
    OverSequence,
    PatchEmbedding,
    SelfAttention,
    no_announcement,
    sinusoid,
    time_vectors,
)
from .text_keys import TextKeys

Sides = dict[str, Any]
"""The tensors that variants add to the tokens behind some blocks, under a name for each variant."""


def _no_wait(_block: int) -> None:
    pass


class WanModel(nn.Module):
    """The DiT. `from_checkpoint` builds a model with weights; a bare instance has the shapes alone.

    Attributes:
        block: the class of the blocks.
        over_sequence: combines tensors with the ranks that have the other tokens; None where one rank has all tokens.
        span: the blocks to run, by default all. A pipeline stage runs some blocks: a stage without the first block
            takes the residual stream, a stage without the last block gives the residual stream (see `transform`).
        self_kernel: attention kernel of self-attention; `kernel` is that of cross-attention.

    Args:
        config: dimensions.
        kernel: attention kernel.
        compute_dtype: dtype of matrix products and attention.
        slice_tokens: cross-attention and feed-forward take at most this many tokens at once, which bounds
            their activation memory; 0 takes all.
    """

    block: ClassVar[type[Block]] = Block
    over_sequence: OverSequence | None = None

    def __init__(
        self,
        config: WanConfig,
        kernel: AttentionKernel,
        compute_dtype: torch.dtype = torch.float32,
        slice_tokens: int = 0,
    ):
        super().__init__()
        self.config, self.kernel, self.self_kernel = config, kernel, kernel
        self.compute_dtype, self.slice_tokens = compute_dtype, slice_tokens
        self.span = range(config.num_layers)
        self.text_keys: TextKeys | None = None  # for whoever runs step after step
        d = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, d)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, d), nn.GELU(approximate="tanh"), Linear(d, d))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, d), nn.SiLU(), Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        self.blocks = nn.ModuleList(self.block(config, bool(config.image_dim)) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim:
            self.img_emb = ImageEmbedding(config.image_dim, d, config.image_positions)

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        weight_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | AttentionKernel = "auto",
        slice_tokens: int = 0,
        module: str = "",
    ) -> WanModel:
        """Build the model of a checkpoint and of the `module` beside it (see `open_weights`), tensor by tensor.

        Raises:
            CheckpointError: the file is no Wan DiT that can run.
            AttentionError: the attention kernel is missing or cannot run this dtype.
        """
        device = torch.device(device)
        pointwise.use_triton(device)
        source = open_weights(path, device, module)
        if isinstance(attention, str):
            attention = get_kernel(attention, device, compute_dtype)
        with torch.device("meta"):
            model = model_class(source.config)(source.config, attention, compute_dtype, slice_tokens)
        for name in source.config.shapes():
            model.set_weight(name, cast_and_move(source.tensor(name), weight_dtype, device, name))
        return model.eval().requires_grad_(False)

    def set_weight(self, name: str, weight: Weight) -> None:
        """Give the model the weight called `name`, in place of the one it has."""
        owner, _, attribute = name.rpartition(".")
        module = self.get_submodule(owner)
        if isinstance(weight, QuantizedWeight):
            module._parameters.pop(attribute, None)  # torch refuses anything but a Parameter in its place
            setattr(module, attribute, weight)
        else:
            setattr(module, attribute, nn.Parameter(weight, requires_grad=False))

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Every weight with its name, quantised ones included (`named_parameters` leaves these out)."""
        for name in self.config.shapes():
            owner, _, attribute = name.rpartition(".")
            yield name, getattr(self.get_submodule(owner), attribute)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        conditioning: Conditioning = NOTHING,
    ) -> torch.Tensor:
        """Predict the velocity.

        Args:
            x: latent [B, in_dim, T, H, W].
            timestep: sigma * 1000, [B] or one for each latent frame [B, T].
            context: text embedding [B, L, text_dim].
            conditioning: further inputs of some variants.

        Returns:
            float32 [B, out_dim, T, H, W].
        """
        frames = x.shape[2]
        x, conditioning = extended(x, conditioning)
        grid = sequence_of(x, conditioning.options)
        tokens = patchify(pad_to_patch(x))
        part = slice(0, grid.tokens)
        out = self.transform(tokens, grid, part, timestep, context, conditioning=conditioning)
        return core(unpatchify(out[:, : grid.video_tokens], grid, x.shape[-3:]), frames, conditioning.options)

    def transform(
        self,
        tokens: torch.Tensor,
        grid: Grid,
        part: Part,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attend: SelfAttention | None = None,
        before_block: Callable[[int], None] | None = None,
        conditioning: Conditioning = NOTHING,
        kernel: AttentionKernel | None = None,
    ) -> torch.Tensor:
        """Run the DiT on the tokens `part` of a grid.

        Args:
            tokens: the tokens [B, n, in_dim*4] of the video in `part`. For a `span` that begins behind the first block,
                the result of the blocks before, which is changed in place.
            attend: self-attention over the whole grid for the queries of this part; None, for a part that is the whole
                grid, takes the model's own kernel.
            before_block: called with the number of each block (see `WanConfig.run_order`) before the block runs.
            conditioning: the conditioning that `extended` returned, for all tokens of the grid.
            kernel: of cross-attention; None takes the model's own.

        Returns:
            float32 [B, n, out_dim*4]. For a `span` that ends before the last block, the residual stream [B, n, dim];
            where k side streams are `carried` on, the residual stream and these streams, [1 + k, B, n, dim].
        """
        inputs, embedding = self._block_inputs(tokens, grid, part, timestep, context, attend, conditioning, kernel)
        if self.span.start == 0:
            x, carried = self.embed(tokens, grid, part, conditioning), []
        else:
            x, *carried = tokens if tokens.ndim == 4 else [tokens]
        sides = self.side_streams(x, grid, part, conditioning, carried)
        before_block = before_block or _no_wait
        for i in self.span:
            before_block(i)
            if i not in conditioning.options.skip_blocks:
                x = self.blocks[i](x, inputs)
            for side in self.config.side_blocks(range(i, i + 1)):
                before_block(self.config.num_layers + side)
            self.add_sides(x, sides, i, inputs, conditioning)
        if self.span.stop == len(self.blocks):
            return self.head_for(conditioning)(x, embedding, inputs)
        if not self.carried(self.span.stop, conditioning):
            return x
        return tokens if carried else torch.stack([x, *self.onward(sides)])  # all of them were changed in place

    def _block_inputs(
        self,
        tokens: torch.Tensor,
        grid: Grid,
        part: Part,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attend: SelfAttention | None,
        conditioning: Conditioning,
        kernel: AttentionKernel | None,
    ) -> tuple[BlockInputs, torch.Tensor]:
        """The arguments of every block beside the tokens, and the time embedding for the head (see `transform`)."""
        times, row_of_token = self.times(timestep.reshape(len(timestep), -1), grid, part, conditioning)
        embedding = self.time_embedding(sinusoid(times, self.config.freq_dim))
        text = self.text_embedding(context.to(self.compute_dtype))
        image = self.image_context(conditioning, text)
        blocks = len(self.config.run_order(self.span))
        inputs = BlockInputs(
            time=time_vectors(self.time_projection(embedding)),
            row_of_token=row_of_token,
            context=text,
            image=image,
            rope=sequence_table(grid.shape, self.config.head_dim, tokens.device, conditioning.options)[part],
            attend=attend or self.self_kernel,
            announce=getattr(attend, "announce", no_announcement),
            kernel=kernel or self.kernel,
            compute_dtype=self.compute_dtype,
            slice_tokens=self.slice_tokens,
            audio_context=self.audio_context(grid, part, conditioning, tokens.device),
            kept=self.text_keys.of(text, image, blocks) if self.text_keys is not None else None,
        )
        return inputs, embedding

    # Methods that variants override (see wanvideo/variants/). Each override calls `super()`, so that variants compose.

    def embed(self, tokens: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens of `part`, the video's `tokens` [B, n, in_dim*4] and context, as float32 [B, all, dim]."""
        if not grid.context_tokens or not isinstance(part, slice):  # indices are of the video alone
            return self.embed_video(tokens, grid, part, conditioning)
        x = self.embed_video(tokens, grid, video_part(grid, part), conditioning)
        first, last = (max(place - grid.video_tokens, 0) for place in (part.start, part.stop))
        return torch.cat([x, self.embed_context(conditioning, slice(first, last), x.device)], dim=1)

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens [B, n, in_dim*4] of the video, which has them at `video`, in float32 [B, n, dim]."""
        return self.patch_embedding(tokens.float())

    def embed_context(self, conditioning: Conditioning, places: slice, device: torch.device) -> torch.Tensor:
        """Embed the context tokens `places`, counted from the first context token, in float32 [B, n, dim]."""
        return self.patch_embedding(conditioning.given["context_videos"][:, places].to(device).float())

    def times(
        self, timestep: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The different times [B, R], and the index [n] of the time of each token of `part`; None where R is 1.

        Args:
            timestep: [B, 1], or [B, T] with a time for each frame.
        """
        if timestep.shape[1] == 1:
            return timestep, None
        frames = torch.arange(grid.tokens, device=timestep.device)[part] // grid.frame_tokens
        return timestep, frames.clamp(max=grid.frames - 1)  # context tokens have the time of the last frame

    def head_for(self, conditioning: Conditioning) -> Head:
        """The head that computes the result of a forward with this conditioning."""
        return self.head

    def audio_context(self, grid: Grid, part: Part, conditioning: Conditioning, device: torch.device) -> Any:
        """The audio that the blocks attend to for the tokens `part`, in the variant's own form; None without audio."""
        return None

    def asks_other_ranks(self, conditioning: Conditioning) -> bool:
        """Whether blocks communicate with the ranks of the other tokens (`over_sequence`) outside self-attention."""
        return False

    def image_context(self, conditioning: Conditioning, text: torch.Tensor) -> torch.Tensor | None:
        """The image tokens for cross-attention, [B, any, dim] in the dtype of the embedded text; None for a model that
        attends to no image."""
        if not self.config.image_dim:
            return None
        if conditioning.image is None:
            return text  # as in ComfyUI, whose graphs may leave the CLIP tokens out
        return self.img_emb(conditioning.image.to(text.device), self.compute_dtype)

    def side_streams(
        self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning, carried: list[torch.Tensor]
    ) -> Sides:
        """The tensors that `add_sides` needs, such as side streams that begin with the tokens x, float32 [B, n, dim].

        Args:
            carried: the side streams that the stage before has given to a stage without the first block.
        """
        return {}

    def carried(self, block: int, conditioning: Conditioning) -> int:
        """The number of side streams that the blocks before `block` must hand to the blocks from `block` on."""
        return 0

    def onward(self, sides: Sides) -> list[torch.Tensor]:
        """The side streams [B, n, dim] that this stage hands to the next stage (see `carried`)."""
        return []

    def add_sides(
        self, x: torch.Tensor, sides: Sides, block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        """Add to x in place what the variant adds behind block `block` of the video, and advance the side streams."""

    def self_attentions(self, conditioning: Conditioning, blocks: range) -> int:
        """The number of self-attention calls in one forward through these `blocks` of the video."""
        return len(set(blocks) - set(conditioning.options.skip_blocks))


def model_class(config: WanConfig) -> type[WanModel]:
    """The class of the DiT that a configuration describes: `WanModel` with the layers of all its variants."""
    layers = (variant.layers() for variant in config.variants)
    return _composed(tuple(found for found in layers if found is not None))


@functools.cache
def _composed(layers: tuple[type[WanModel], ...]) -> type[WanModel]:
    """A subclass of all classes in `layers`; a class acts before the classes behind it in `layers`."""
    if len(layers) <= 1:
        return layers[0] if layers else WanModel
    return type("".join(cls.__name__ for cls in layers), layers[::-1], {})
