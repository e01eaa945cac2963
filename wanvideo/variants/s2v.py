"""Wan 2.2 S2V: a text-to-video model with audio, a reference image of a subject, and motion frames.

Motion frames are the last frames of the video that the new video goes on from. The tokens of the subject and of the
motion frames follow the tokens of the latent as context tokens, with the time 0 and positions of their own. The last
motion frame is as fine as the latent, earlier motion frames are coarser. Behind some blocks the tokens of a frame
attend to the audio of that frame. Every step works on any part of the tokens.

Sources: Wan 2.2 `wan/modules/s2v/`; the packing of frames is that of FramePack (arXiv 2504.12626). Shapes, orders and
positions as ComfyUI runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..base.conditioning import Conditioning, check_no_subjects, with_context_grids
from ..base.config import WanConfig
from ..base.grid import Grid, Part, pad_to_patch, patchify
from ..base.options import ContextGrid, RopeOptions
from ..base.shapes import Shapes, attention, convolution, linear, patch_embedding
from ..base.user_error import InputError
from ..base.variant import GATHERED, Input, Key, SideAttention, TensorShapes, Variant, attention_splits
from ..model.frames import (
    CausalConvolution,
    CausalEncoder,
    Run,
    causal_convolution_shapes,
    causal_encoder_shapes,
    few_keys,
    runs_of,
)
from ..model.layers import Attention, BlockInputs, Linear, PatchEmbedding
from ..model.model import Sides, WanModel
from ..ops import pointwise
from ..quant.quantized import as_tensor

_VIDEO, _SUBJECT, _MOTION = range(3)  # rows of the learned vectors that tell kinds of tokens apart
_ADAPTIVE_EPS = 1e-5
_TIMED_BYTES = 8  # two float32 vectors a token, where tokens have times of their own and Triton does not work

_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
"""The blocks behind which tokens attend to audio; a file has an injector for each, however many blocks it has."""

_PACKED = {"proj": (1, 2, 2), "proj_2x": (2, 4, 4), "proj_4x": (4, 8, 8)}
"""The convolutions of the motion frames, by their size (= stride) in frames, rows and columns of the latent."""
_PACKED_FRAMES = (1, 2, 16)
"""The number of motion frames that each convolution of `_PACKED` sees, counted from the last motion frame back."""

_SUBJECT_TIME, _SUBJECT_DISTANCE = 30, 9  # the subject stands at this frame, or so far behind the video
_ENCODER = "casual_audio_encoder.encoder"


@dataclass(frozen=True)
class S2V(Variant):
    """The dimensions of S2V's layers.

    Args:
        features: width of the audio features.
        encoder_layers: layers of the audio encoder; the outputs of all layers are features.
        heads: audio tokens of a latent frame, to which a learned token is added.
        control_dim: channels of a control video's latent.
    """

    features: int = 1024
    encoder_layers: int = 25
    heads: int = 4
    control_dim: int = 16

    name = "S2V"
    order = 90
    comfyui_names = ("s2v",)
    node = "WanSoundImageToVideo"
    inputs = (
        Input(
            "audio",
            lambda own, asked: (asked.batch, own.encoder_layers, own.features, None),
            Key("audio_embed", "an audio embedding", "WanSoundImageToVideo"),
        ),
        Input(
            "control",
            lambda own, asked: (asked.batch, own.control_dim, asked.frames, asked.height, asked.width),
            Key("control_video", "a control video", "WanSoundImageToVideo"),
        ),
        Input(
            "subject",
            lambda _, asked: (asked.batch, asked.config.in_dim, None, asked.height, asked.width),
            Key("reference_latent"),
        ),
        Input(
            "motion_frames",
            lambda _, asked: (asked.batch, asked.config.in_dim, None, asked.height, asked.width),
            Key("reference_motion", "the video so far", "WanSoundImageToVideo"),
        ),
    )
    ignored = ("clip_fea",)
    splits = (
        *attention_splits(r"audio_injector\.injector\.\d+"),
        (r"injector_adain_layers\.\d+\.linear\.(weight|bias)", GATHERED),
    )
    rounded = frozenset({"audio_injector"})
    first_stage = frozenset({"trainable_cond_mask", "cond_encoder", "frame_packer"})
    why_exact = "S2V's reference lies behind the video, in no patch of it"

    @classmethod
    def read(cls, tensors: TensorShapes) -> S2V | None:
        """The dimensions of a file with S2V's audio encoder; None for a file without."""
        last = f"{_ENCODER}.final_linear.weight"
        if last not in tensors.tensors:
            return None
        local = tensors.needed(f"{_ENCODER}.conv1_local.conv.weight", 3)
        return cls(
            features=local[1],
            encoder_layers=tensors.needed("casual_audio_encoder.weights", 4)[1],
            heads=local[0] * 4 // tensors.needed(last, 2)[0],
            control_dim=tensors.needed("cond_encoder.weight", 5)[1],
        )

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the encoders, of the injectors and of the convolutions of the motion frames."""
        dim = config.dim
        shapes: Shapes = {
            "trainable_cond_mask.weight": (3, dim),
            "casual_audio_encoder.weights": (1, self.encoder_layers, 1, 1),
        }
        shapes |= patch_embedding("cond_encoder", self.control_dim, dim)
        shapes |= causal_encoder_shapes(_ENCODER, self.features, (dim // 4, dim // 2, dim), self.heads, dim)
        shapes |= causal_convolution_shapes(f"{_ENCODER}.conv1_global", self.features, dim // 4)
        shapes |= linear(f"{_ENCODER}.final_linear", dim, dim)
        for i in range(len(_LAYERS)):
            shapes |= attention(f"audio_injector.injector.{i}", dim, dim)
            shapes |= linear(f"audio_injector.injector_adain_layers.{i}.linear", dim, 2 * dim)
        for name, size in _PACKED.items():
            shapes |= convolution(f"frame_packer.{name}", config.in_dim, dim, *size)
        return shapes

    def layers(self) -> type[S2VModel]:
        """`S2VModel`."""
        return S2VModel

    def block_number(self, config: WanConfig, name: str) -> int | None:
        """The number of the block behind which the injector with the tensor `name` acts; None for other tensors."""
        part = name.split(".")
        return _LAYERS[int(part[2])] if part[0] == "audio_injector" else None

    def side_attention(self, config: WanConfig) -> SideAttention:
        """The attention to the tokens of a frame's audio, behind some blocks."""
        share = sum(place < config.num_layers for place in _LAYERS) / config.num_layers
        return SideAttention(share, self.heads + 1, config.dim)

    def token_bytes(self, contexts: int) -> int:
        """Bytes of the time vectors, of which each token has its own."""
        return _TIMED_BYTES

    @classmethod
    def with_context_grids(cls, x: torch.Tensor, conditioning: Conditioning) -> Conditioning:
        """The conditioning with the grids of the subject and of the motion frames as context of the latent x."""
        if conditioning.subject is None and conditioning.motion_frames is None:
            return conditioning
        given = conditioning.subject, conditioning.motion_frames
        subject, motion_frames = (None if latent is None else latent.shape[-3:] for latent in given)
        grids = _context_grids(x.shape[-3:], subject, motion_frames)
        return conditioning.having(replace(conditioning.options, context_grids=grids))

    def check(self, config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Check that subject and motion frames fit into whole tokens, and that the audio divides the video evenly.

        Raises:
            InputError: a size or the length of the audio does not fit, or the conditioning has extra frames.
        """
        check_no_subjects(conditioning)
        frames, height, width = x.shape[-3:]
        if with_context_grids(x, conditioning).options.context_grids and (height % 2 or width % 2):
            raise InputError(
                f"The latent is {width} x {height}, but beside a reference S2V takes even sizes alone. "
                "Use a width and a height that are multiples of 16 pixels."
            )
        if conditioning.motion_frames is not None and min(height, width) < 8:
            raise InputError(
                f"The latent is {width} x {height}, but to go on with a video S2V needs 8 x 8 at least. "
                "Use a width and a height of at least 64 pixels."
            )
        if conditioning.audio is not None:
            audio_frames = -(-min(4 * frames, conditioning.audio.shape[-1]) // 4)
            if not audio_frames or frames * -(-height // 2) * -(-width // 2) % audio_frames:
                raise InputError(
                    f"The sound lasts for {audio_frames} of {frames} latent frames, which do not divide the video "
                    "evenly. Use a shorter length, or a longer sound."
                )


def _context_grids(
    video: Sequence[int], subject: Sequence[int] | None, motion_frames: Sequence[int] | None
) -> tuple[ContextGrid, ...]:
    """The grids of the subject and of the motion frames; arguments are (frames, height, width) of latents."""
    grids = []
    if subject is not None:
        first = max(_SUBJECT_TIME, video[0] + _SUBJECT_DISTANCE)
        grids.append(ContextGrid(subject[0], subject[1] // 2, subject[2] // 2, RopeOptions(shift_t=float(first))))
    if motion_frames is not None:
        grids += _packed(motion_frames[1], motion_frames[2])
    return tuple(grids)


def _packed(height: int, width: int) -> Iterator[ContextGrid]:
    """The grids of the motion frames, the last frame first; coarser grids span the same rows and columns."""
    first = 0
    for frames, (size, rows, columns) in zip(_PACKED_FRAMES, _PACKED.values(), strict=True):
        first -= frames
        own = height // rows, width // columns
        scale_y, scale_x = (_spread(length // 2, count) for length, count in zip((height, width), own, strict=True))
        rope = RopeOptions(shift_t=float(first), scale_y=scale_y, scale_x=scale_x)
        yield ContextGrid(frames // size, *own, rope)


def _spread(length: int, count: int) -> float:
    """The step with which `count` positions go from the first of `length` to the last."""
    return (length - 1) / (count - 1) if count > 1 else 1.0


class MotionEncoder(CausalEncoder):
    """Encodes audio features as one token for each latent frame, and as several tokens for each latent frame."""

    def __init__(self, config: WanConfig):
        dim, s2v = config.dim, config[S2V]
        super().__init__(s2v.features, (dim // 4, dim // 2, dim), s2v.heads, dim)
        self.conv1_global = CausalConvolution(s2v.features, dim // 4)
        self.final_linear = Linear(dim, dim)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode features [B, t, features] as [B, ceil(t/4), 1, dim] and as [B, ceil(t/4), heads + 1, dim]."""
        whole = self.final_linear(self.encode(features, self.conv1_global, 1))
        return whole, self.padded(self.encode(features, self.conv1_local, self.heads))


class AudioEncoder(nn.Module):
    """Averages the outputs of all layers of an audio encoder by learned weights, and encodes the mean as tokens."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(1, config[S2V].encoder_layers, 1, 1), requires_grad=False)
        self.encoder = MotionEncoder(config)

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode audio [B, layers, features, t] in float32; results as of `MotionEncoder`."""
        shares = F.silu(self.weights.float())
        mean = (audio * shares).sum(dim=1) / shares.sum()
        return self.encoder(mean.transpose(1, 2))


class Adaptive(nn.Module):
    """Computes shift and scale of a frame's tokens from the audio of that frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute shift and scale, each in the shape of `whole` [B, frames, 1, dim]."""
        return self.linear(F.silu(whole)).chunk(2, dim=-1)


class AudioInjector(nn.Module):
    """The cross-attention of a frame's tokens to the audio of the frame, behind some blocks."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.injector = nn.ModuleList(Attention(config) for _ in _LAYERS)
        self.injector_adain_layers = nn.ModuleList(Adaptive(config.dim) for _ in _LAYERS)

    def forward(
        self,
        x: torch.Tensor,
        place: int,
        whole: torch.Tensor,
        tokens: torch.Tensor,
        runs: list[Run],
        inputs: BlockInputs,
    ) -> None:
        """Add to x [B, n, dim] (float32) in place the attention to the audio of all frames.

        Args:
            place: the injector's position in `_LAYERS`.
            whole: the audio as one token for each frame, [B, frames, 1, dim].
            tokens: the audio as several tokens for each frame, [B, frames, heads + 1, dim].
            runs: the runs by frames of the tokens x.
        """
        attention, dtype = cast(Attention, self.injector[place]), inputs.compute_dtype
        shift, scale = self.injector_adain_layers[place](whole)
        audio_inputs = replace(inputs, context=tokens.flatten(1, 2).to(dtype))
        k, v = (y.unflatten(1, tokens.shape[1:3]) for y in attention.context_keys(audio_inputs)[0])
        for run in runs:
            y = pointwise.norm(run.of(x), 1 + run.own(scale), run.own(shift), _ADAPTIVE_EPS, dtype)
            y = attention.cross_attention(y, [(run.own(k), run.own(v))], few_keys)
            pointwise.add_(x[:, run.tokens], run.back(y))


class Packing(nn.Module):
    """A Conv3d (kernel = stride) that packs a stretch of motion frames into tokens."""

    def __init__(self, columns: int, rows: int, size: tuple[int, int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, *size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False)

    def forward(self, stretch: torch.Tensor) -> torch.Tensor:
        """Pack `stretch` [B, C, T, H, W] into tokens [B, n, rows]."""
        weight = self.weight.to(stretch.dtype)
        return F.conv3d(stretch, weight, self.bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


class Kinds(nn.Module):
    """Learned vectors that tell the tokens of the video, of the subject and of the motion frames apart."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, dim), requires_grad=False)

    def forward(self, kind: int) -> torch.Tensor:
        """The vector [dim] of a kind of tokens, in float32."""
        return as_tensor(self.weight, torch.float32)[kind]


class S2VModel(WanModel):
    """The DiT of S2V."""

    def __init__(self, config: WanConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.trainable_cond_mask = Kinds(config.dim)
        self.casual_audio_encoder = AudioEncoder(config)
        self.cond_encoder = PatchEmbedding(config[S2V].control_dim, config.dim)
        self.audio_injector = AudioInjector(config)
        packings = {name: Packing(config.in_dim, config.dim, size) for name, size in _PACKED.items()}
        self.frame_packer = nn.ModuleDict(packings)

    def embed_video(self, tokens: torch.Tensor, grid: Grid, video: Part, conditioning: Conditioning) -> torch.Tensor:
        """Embed the tokens `video` of the video, with the control video and the learned vector of the video added."""
        x = super().embed_video(tokens, grid, video, conditioning) + self.trainable_cond_mask(_VIDEO)
        if conditioning.control is not None:
            control = patchify(pad_to_patch(conditioning.control.to(x.device, torch.float32)))
            x += self.cond_encoder(control[:, video])
        return x

    def embed_context(self, conditioning: Conditioning, places: slice, device: torch.device) -> torch.Tensor:
        """Embed the context tokens `places`, which are those of the subject and then those of the motion frames."""
        return torch.cat(list(self._embedded_context(conditioning, device)), dim=1)[:, places]

    def _embedded_context(self, conditioning: Conditioning, device: torch.device) -> Iterator[torch.Tensor]:
        """The embedded tokens [B, n, dim] of the subject, then of each stretch of motion frames."""
        if conditioning.subject is not None:
            subject = patchify(conditioning.subject.to(device, torch.float32))
            yield self.patch_embedding(subject) + self.trainable_cond_mask(_SUBJECT)
        if conditioning.motion_frames is not None:
            frames = sum(_PACKED_FRAMES)
            video = conditioning.motion_frames[:, :, -frames:].to(device, torch.float32)
            video = F.pad(video, (0, 0, 0, 0, frames - video.shape[2], 0))
            stretches = video.split(_PACKED_FRAMES[::-1], dim=2)[::-1]
            for packing, stretch in zip(self.frame_packer.values(), stretches, strict=True):
                yield packing(stretch) + self.trainable_cond_mask(_MOTION)

    def times(
        self, timestep: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The times as in `WanModel.times`, with the time 0 for context tokens.

        Where a frame has an odd number of tokens and the conditioning has motion frames, ComfyUI gives a few tokens at
        the end of a frame the time of the next frame, and so does this method.
        """
        if not grid.context_tokens:
            return super().times(timestep, grid, part, conditioning)
        subjects = 0 if conditioning.subject is None else conditioning.subject.shape[2]
        halves, packed = (1, 0) if conditioning.motion_frames is None else (2, 3)  # motion frames fill 1.5 frames
        length = -(-grid.tokens // ((grid.frames + subjects) * halves + packed))
        frame = torch.arange(grid.tokens, device=timestep.device)[part] // length // halves
        last = timestep.shape[1]
        return F.pad(timestep, (0, 1)), torch.where(frame < grid.frames, frame.clamp(max=last - 1), last)

    def side_streams(
        self, x: torch.Tensor, grid: Grid, part: Part, conditioning: Conditioning, carried: list[torch.Tensor]
    ) -> Sides:
        """The audio of every frame as one token and as several tokens, and the runs by frames of the tokens `part`."""
        sides = super().side_streams(x, grid, part, conditioning, carried)
        if conditioning.audio is None:
            return sides
        audio = conditioning.audio[..., : 4 * grid.frames]
        whole, tokens = conditioning.once("audio", lambda: self.casual_audio_encoder(audio.to(x.device, torch.float32)))
        frames = tokens.shape[1]
        return sides | {"audio": (whole, tokens, runs_of(part, grid.video_tokens // frames, frames))}

    def add_sides(
        self, x: torch.Tensor, sides: Sides, block: int, inputs: BlockInputs, conditioning: Conditioning
    ) -> None:
        """Add, behind some blocks, each token's attention to the audio of its frame."""
        super().add_sides(x, sides, block, inputs, conditioning)
        if "audio" in sides and block in _LAYERS:
            self.audio_injector(x, _LAYERS.index(block), *sides["audio"], inputs)
