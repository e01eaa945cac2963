"""The Wan variants: small modules around the same blocks, each reading one input of a `Conditioning`.

| input | of | does |
|---|---|---|
| image | Wan 2.1 image-to-video, first-last-frame, Fun | context tokens for a second cross-attention in every block |
| reference | Fun-Control | a frame of tokens in front of the video |
| camera | Fun-Camera | added to the token embedding |
| vace | VACE | further blocks on the same tokens, whose output is added behind every few blocks |
| tail | SCAIL, Bernini | tokens of further videos behind those of the video (see context_tokens.py) |
| mask | SCAIL-2 | added to the token embedding |
| audio | HuMo, WanDancer | heard by each token (see humo.py), or added behind some blocks (see wandancer.py) |
| audio, speakers | InfiniteTalk | heard by each token, whose place says who speaks (see infinitetalk.py) |

Animate and S2V have files of their own (animate.py, s2v.py; see build.py).

All act on any part of the tokens. Which of them a model has is told by its `WanConfig`.

Sources: Wan 2.1 `wan/modules/model.py` and `vace_model.py`, VideoX-Fun `wan_transformer3d.py` and
`wan_camera_adapter.py`; shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import CAMERA_PIXELS, Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part, pad_to_patch, patchify, video_part
from ..base.variant_shapes import MUSIC_LAYERS
from ..model.context_tokens import embed_tail
from ..model.layers import Block, BlockInputs, Head, Linear, PatchEmbedding
from ..model.model import WanModel
from . import humo, infinitetalk, wandancer


class ImageEmbedding(nn.Module):
    """CLIP tokens [B, n, image_dim] to context tokens [B, n, dim]."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width, dim = config.image_dim, config.dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width), Linear(width, width), nn.GELU(), Linear(width, dim), nn.LayerNorm(dim)
        )
        if config.image_positions:
            self.emb_pos = nn.Parameter(torch.empty(1, config.image_positions, width), requires_grad=False)

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The norms are in float32, the products and the result in `dtype`."""
        norm_in, up, gelu, down, norm_out = self.proj
        tokens = tokens.float()
        if hasattr(self, "emb_pos"):  # with one image of two, its tokens take the first half
            tokens = tokens[:, : self.emb_pos.shape[1]] + self.emb_pos[:, : tokens.shape[1]]
        y = down(gelu(up(norm_in(tokens).to(dtype))))
        return norm_out(y.float()).to(dtype)


class Convolution(nn.Module):
    """A Conv2d in the dtype of its input, whatever the weights are held in."""

    def __init__(self, columns: int, rows: int, size: int, **options: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, size, size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), **self.options)


class ReferenceEmbedding(Convolution):
    """The convolution of a reference latent (kernel = stride = patch) as one product over its tokens."""

    def __init__(self, config: WanConfig):
        super().__init__(config.reference_dim, config.dim, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, n, C*4] of `patchify`, of which the first channels are the reference's; float32 [B, n, dim]."""
        weight = self.weight.flatten(1).float()
        return F.linear(tokens[..., : weight.shape[1]].float(), weight, self.bias)


class CameraResidual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = Convolution(dim, dim, 3, padding=1)
        self.conv2 = Convolution(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """A camera path to a vector for each token. Only pixels of one frame meet."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.conv = Convolution(config.camera_dim * CAMERA_PIXELS**2, config.dim, 2, stride=2)
        self.residual_blocks = nn.Sequential(CameraResidual(config.dim))

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        """One frame [B, camera_dim, 8*H, 8*W] to [B, rows*columns, dim] of its tokens."""
        pixels = pad_to_patch(F.pixel_unshuffle(frame, CAMERA_PIXELS))
        return self.residual_blocks(self.conv(pixels)).flatten(2).transpose(1, 2)


class VaceBlock(Block):
    """A block on the tokens of a control video; what it adds to the video's is `after_proj` of its output."""

    def __init__(self, config: WanConfig, first: bool):
        super().__init__(config, image=False)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)


class VariantModel(WanModel):
    """A Wan DiT with whatever modules its configuration names; without any, the text-to-video model.

    Attributes:
        over_sequence: how to ask the ranks that have the other tokens; None where there are none.
    """

    over_sequence: infinitetalk.OverSequence | None = None

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        if config.reference_dim:
            self.ref_conv = ReferenceEmbedding(config)
        if config.camera_dim:
            self.control_adapter = CameraAdapter(config)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.vace_dim, config.dim)
            self.vace_blocks = nn.ModuleList(VaceBlock(config, first=i == 0) for i in range(config.vace_layers))
        if config.humo:
            self.audio_proj = humo.AudioProjection(config.humo)
            self.blocks = nn.ModuleList(humo.HumoBlock(config) for _ in range(config.num_layers))
        if config.talk:
            blocks = (infinitetalk.TalkBlock(config, bool(config.image_dim)) for _ in range(config.num_layers))
            self.blocks = nn.ModuleList(blocks)
        if config.music:
            self.img_emb_refimage = ImageEmbedding(
                replace(config, image_dim=config.music.image_dim, image_positions=0)
            )
            self.patch_embedding_global = PatchEmbedding(config.in_dim, config.dim)
            self.head_global = Head(config)
            self.music_projection = Linear(config.music.features, config.music.width)
            self.music_encoder = nn.ModuleList(wandancer.MusicLayer(config.music) for _ in range(config.music.layers))
            self.music_injector = wandancer.MusicInjector(config)
        self.patch_embedding_pose = PatchEmbedding(config.pose_dim, config.dim) if config.pose_dim else None
        self.patch_embedding_mask = PatchEmbedding(config.mask_dim, config.dim) if config.mask_dim else None

    def embed(self, tokens: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> torch.Tensor:
        video = video_part(grid, part)
        embedding = self.patch_embedding_global if conditioning.options.fps else self.patch_embedding
        x = embedding(tokens.float())
        if conditioning.options.reference_frames and self.config.reference_dim:
            places = torch.arange(grid.tokens, device=tokens.device)[video]
            front = places < conditioning.options.reference_frames * grid.frame_tokens
            x[:, front] = self.ref_conv(tokens[:, front])
        if conditioning.camera is not None:
            x += self._camera(conditioning.camera, grid, video, x.device)
        if conditioning.mask is not None:
            window, own = _frames(grid, video)
            masks = conditioning.mask[:, :, window].to(x.device, torch.float32)
            x += self.patch_embedding_mask(patchify(pad_to_patch(masks))[:, own])
        if not grid.tail:
            return x
        first, last = (max(place - grid.video_tokens, 0) for place in (part.start, part.stop))
        behind = conditioning.tail[:, first:last].to(x.device)
        behind = embed_tail(behind, self.patch_embedding, self.patch_embedding_pose, self.patch_embedding_mask)
        return torch.cat([x, behind], dim=1)

    def image_context(self, conditioning: Conditioning, text: torch.Tensor) -> torch.Tensor | None:
        if not self.config.image_dim:
            return None
        if self.config.music:  # without any image there is none to attend to
            given = ((self.img_emb_refimage, conditioning.image_ref), (self.img_emb, conditioning.image))
            images = [embed(image.to(text.device), self.compute_dtype) for embed, image in given if image is not None]
            return torch.cat([text[:, :0], *images], dim=1)
        if conditioning.image is None:
            return text  # as in ComfyUI, whose graphs may leave the CLIP tokens out
        return self.img_emb(conditioning.image.to(text.device), self.compute_dtype)

    def head_for(self, conditioning: Conditioning) -> Head:
        return self.head_global if conditioning.options.fps else self.head

    def heard(
        self, grid: Grid, part: Part, conditioning: Conditioning, device: torch.device
    ) -> humo.Heard | infinitetalk.Speech | None:
        if self.config.talk and conditioning.audio is not None:
            audio, speakers = conditioning.audio.to(device, self.compute_dtype), conditioning.speakers
            speakers = None if speakers is None else speakers.to(device, self.compute_dtype)
            scale = conditioning.options.audio_scale
            return infinitetalk.Speech(audio, speakers, scale, grid, part, self.over_sequence)
        if not self.config.humo or conditioning.audio is None:
            return None
        audio = self.audio_proj(conditioning.audio.to(device), self.compute_dtype)
        return humo.Heard(audio, humo.moments(grid, part, audio.shape[1]))

    def side_streams(self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning) -> list[torch.Tensor]:
        """One stream for each VACE context; WanDancer's music, and what each token hears of it."""
        if self.config.music and conditioning.audio is not None:
            audio = conditioning.audio.to(x.device)
            music = wandancer.encode_music(audio, self.music_projection, self.music_encoder, grid, self.config.dim)
            return [music, wandancer.moment_of(grid, part, x.device)]
        if conditioning.vace is None or self.span.start:
            return []  # behind the first block the streams are `carried`
        window, own = _frames(grid, part)
        first = self.vace_blocks[0].before_proj
        streams = []
        for video in conditioning.vace[:, :, :, window].unbind(1):
            tokens = patchify(pad_to_patch(video.to(x.device, torch.float32)))[:, own]
            embedded = self.vace_patch_embedding(tokens)
            streams.append(x + first(embedded.to(self.compute_dtype)))
        return streams

    def add_sides(
        self, x: torch.Tensor, sides: list[torch.Tensor], block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        if self.config.music:
            if sides and block in MUSIC_LAYERS:
                injector = self.music_injector.injector[MUSIC_LAYERS.index(block)]
                wandancer.add_music(x, *sides, injector, conditioning.options.audio_scale, inputs.compute_dtype)
            return
        if not sides or block % self.config.vace_stride:
            return
        vace = self.vace_blocks[block // self.config.vace_stride]
        for stream, strength in zip(sides, conditioning.options.vace_strengths, strict=True):
            vace(stream, inputs)
            x.add_(vace.after_proj(stream.to(inputs.compute_dtype)), alpha=strength)

    def carried(self, block: int, conditioning: Conditioning) -> int:
        to_come = self.config.vace_behind(range(block, self.config.num_layers))
        return len(conditioning.options.vace_strengths) if to_come and conditioning.vace is not None else 0

    def self_attentions(self, conditioning: Conditioning, blocks: range) -> int:
        contexts = 0 if conditioning.vace is None else len(conditioning.options.vace_strengths)
        return super().self_attentions(conditioning, blocks) + contexts * len(self.config.vace_behind(blocks))

    def _camera(self, camera: torch.Tensor, grid: Grid, part: Part, device: torch.device) -> torch.Tensor:
        """The adapter's output for the tokens `part`, [B, n, dim]; only their frames are fetched and computed."""
        window, own = _frames(grid, part)
        frames = (frame.to(device, self.compute_dtype) for frame in camera[:, :, window].unbind(2))
        return torch.cat([self.control_adapter(frame) for frame in frames], dim=1)[:, own]


def _frames(grid: Grid, part: Part) -> tuple[slice, Part]:
    """The frames that the tokens `part` lie in, at least one, and the places of those tokens in these frames."""
    if isinstance(part, slice):
        first = min(part.start // grid.frame_tokens, grid.frames - 1)
        stop = max(first + 1, math.ceil(part.stop / grid.frame_tokens))
        offset = first * grid.frame_tokens
        return slice(first, stop), slice(part.start - offset, part.stop - offset)
    first = int(part.min()) // grid.frame_tokens
    return slice(first, int(part.max()) // grid.frame_tokens + 1), part - first * grid.frame_tokens
