"""InfiniteTalk and MultiTalk: an image-to-video model whose tokens also attend to the speech of their frame.

The layers come in a file of their own, a model patch (see checkpoint/infinitetalk_module.py), and act between
cross-attention and feed-forward of every block. With two speakers, a mask of the first frame shows where each speaker
is. A token attends more to the speech of the speaker in whose part of the first frame the token's query finds more
similar keys: this similarity becomes a position on a line, by which the token's query in the attention to speech is
rotated. The keys of the two speeches are rotated by fixed positions.

A rank computes this for whatever tokens it holds. Only two things need the other ranks: the keys of the first frame,
and the range of the attention to a speaker over all tokens and heads. `OverSequence` combines both over the ranks.

Sources: MultiTalk (arXiv 2505.22647) and InfiniteTalk (arXiv 2508.14033), `wan/modules/multitalk_model.py` and
`wan/modules/attention.py` (MeiGen-AI); shapes and orders as ComfyUI runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from ..base.conditioning import Conditioning
from ..base.config import WanConfig
from ..base.grid import Grid, Part
from ..base.shapes import Shapes, linear, norm
from ..base.user_error import InputError
from ..base.variant import Input, SideAttention, TensorShapes, Variant, paired_attention_splits
from ..model.frames import Run, few_keys, runs_of
from ..model.layers import Block, BlockInputs, LayerNorm, Linear, OverSequence
from ..model.model import WanModel

NORM_EPS = 1e-5  # torch's default
_CLOSE = 1e-8  # keeps quotients of equal numbers finite
_BASE = 10000.0
# The line of positions: each speaker's part has the length _SPAN and one of these starts; the last is of no speaker.
_SPAN = 4.0
_SPEAKER_STARTS = (0.0, 20.0)
_NO_SPEAKER = 12.0


@dataclass(frozen=True)
class InfiniteTalk(Variant):
    """InfiniteTalk's or MultiTalk's attention to speech in every block.

    Args:
        width: numbers of an audio token.
        heads: number of heads of the attention to speech. No tensor shows this number; the released files have 40.
    """

    width: int
    heads: int = 40

    TOKENS: ClassVar[int] = 32
    """The number of tokens that ComfyUI's projection makes of one speaker's speech for a latent frame."""

    order = 60
    module = True
    inputs = (
        Input("audio", lambda own, asked: (asked.batch, asked.frames, None, own.width)),
        Input("speakers", lambda _, asked: (asked.batch, None, -(-asked.height // 2) * -(-asked.width // 2))),
    )
    splits = paired_attention_splits(
        r"audio_cross_attn\.q_linear", r"audio_cross_attn\.kv_linear", r"audio_cross_attn\.proj"
    )

    @classmethod
    def read(cls, tensors: TensorShapes) -> InfiniteTalk | None:
        """The variant with the width of an audio token, or with 0 where the file lacks the tensor that shows it."""
        if "blocks.0.audio_cross_attn.proj.weight" not in tensors.tensors:
            return None
        return cls(tensors.size("blocks.0.audio_cross_attn.kv_linear.weight", -1))

    def shapes(self, config: WanConfig) -> Shapes:
        """The tensors of the attention to speech in each block."""
        shapes: Shapes = {}
        for i in range(config.num_layers):
            shapes |= norm(f"blocks.{i}.norm_x", config.dim)
            shapes |= linear(f"blocks.{i}.audio_cross_attn.q_linear", config.dim, config.dim)
            shapes |= linear(f"blocks.{i}.audio_cross_attn.kv_linear", self.width, 2 * config.dim)
            shapes |= linear(f"blocks.{i}.audio_cross_attn.proj", config.dim, config.dim)
        return shapes

    def layers(self) -> type[InfiniteTalkModel]:
        """`InfiniteTalkModel`."""
        return InfiniteTalkModel

    def divides(self, config: WanConfig) -> bool:
        """Whether the model's width divides into heads of an even size."""
        return config.dim % (2 * self.heads) == 0

    def side_attention(self, config: WanConfig) -> SideAttention:
        """The attention to the tokens of a frame's speech, in every block."""
        return SideAttention(1.0, self.TOKENS, self.width)

    def own_heads(self) -> tuple[int, str]:
        """The number of heads of the attention to speech, and the name of the layers in a refusal."""
        return self.heads, "InfiniteTalk's layers"

    def check(self, config: WanConfig, x: torch.Tensor, conditioning: Conditioning) -> None:
        """Check the speech against the rest of the conditioning.

        Raises:
            InputError: the conditioning has tokens beside the video's, or a number of masks other than two or three.
        """
        if conditioning.audio is None:
            return
        if conditioning.extra_frames is not None or conditioning.context_videos is not None:
            raise InputError(
                "InfiniteTalk cannot be joined with subject images or further videos (WanPhantomSubjectToVideo, "
                "BerniniConditioning). Remove one of them."
            )
        masks = 2 if conditioning.speakers is None else conditioning.speakers.shape[1]
        if masks not in (2, 3):
            raise InputError(
                f"WanInfiniteTalkToVideo was given {masks} masks, but two speakers need 2, or 3 with one of nobody. "
                "Connect one mask to mask_1 and one to mask_2."
            )


@dataclass(frozen=True)
class Speech:
    """The speech to which the video tokens of one rank attend in every block.

    Args:
        audio: audio tokens [B, frames, tokens, width] in the compute dtype; with two speakers, the tokens of the first
            speaker come before those of the second.
        speakers: masks of the speakers in the first frame, [B, masks, rows * columns] of 0 and 1; a third mask shows
            where no speaker is. None for one speaker.
        scale: factor of the attention to speech.
        grid, part: the video tokens of this rank.
        over: combines tensors with the ranks that have the other tokens; None where this rank has all tokens.
    """

    audio: torch.Tensor
    speakers: torch.Tensor | None
    scale: float
    grid: Grid
    part: Part
    over: OverSequence | None = None
    _runs: dict[tuple[int, int], list[Run]] = field(default_factory=dict)

    def runs(self, s: slice) -> list[Run]:
        """The runs by frames of the slice `s` of this rank's tokens."""
        if (s.start, s.stop) not in self._runs:
            part = self.part
            own = slice(part.start + s.start, part.start + s.stop) if isinstance(part, slice) else part[s]
            self._runs[s.start, s.stop] = runs_of(own, self.grid.frame_tokens, self.grid.frames)
        return self._runs[s.start, s.stop]

    def first_keys(self, k: torch.Tensor) -> torch.Tensor:
        """The keys [B, rows * columns, heads, head_dim] of the first frame, out of this rank's keys k [B, n, ...]."""
        first = self.grid.frame_tokens
        if self.over is None:
            return k[:, :first]
        if not isinstance(self.part, slice):
            raise TypeError("ranks that ask each other for keys hold neighbouring tokens")
        start, stop = min(self.part.start, first), min(self.part.stop, first)
        keys = k.new_zeros(k.shape[0], first, *k.shape[2:])
        keys[:, start:stop] = k[:, : stop - start]
        return self.over.add(keys)


@dataclass
class SpeechKeys:
    """The keys and values [B, frames, tokens, heads, head_dim] of a `Speech` in one block, and the positions [B, n] of
    this rank's video tokens on the line of the speakers."""

    speech: Speech
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor | None = None


class SpeechAttention(nn.Module):
    """Attention of a frame's tokens to the speech of that frame."""

    def __init__(self, dim: int, audio: InfiniteTalk):
        super().__init__()
        self.head_dim = dim // audio.heads  # the weights decide the number of heads, as in `Attention`
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(audio.width, 2 * dim)
        self.proj = Linear(dim, dim)

    def speech_keys(self, speech: Speech) -> SpeechKeys:
        """The keys and values of a speech in this block; the keys of two speakers are rotated by their positions."""
        k, v = self.kv_linear(speech.audio).unflatten(-1, (2, -1, self.head_dim)).unbind(3)
        if speech.speakers is not None:
            tokens = torch.arange(k.shape[2], device=k.device)
            second = (tokens >= k.shape[2] // 2).long()
            middles = torch.tensor(_SPEAKER_STARTS, device=k.device) + _SPAN / 2
            k = rotate(k, middles[second])
        return SpeechKeys(speech, k, v)

    def forward(self, x: torch.Tensor, speech_keys: SpeechKeys, s: slice) -> torch.Tensor:
        """Attend from the normed tokens x [B, n, dim], the slice `s` of this rank's tokens, to the speech."""
        q = self.q_linear(x).unflatten(-1, (-1, self.head_dim))
        if speech_keys.positions is not None:
            q = rotate(q, speech_keys.positions[:, s])
        k, v, runs = speech_keys.k, speech_keys.v, speech_keys.speech.runs(s)
        out = [run.back(few_keys(run.of(q), run.own(k), run.own(v))) for run in runs]
        return self.proj(torch.cat(out, dim=1).flatten(2))


class InfiniteTalkBlock(Block):
    """A block with an attention to speech between cross-attention and feed-forward."""

    def __init__(self, config: WanConfig, image: bool = False):
        super().__init__(config, image)
        self.num_heads = config.num_heads
        self.norm_x = LayerNorm(config.dim, NORM_EPS)
        self.audio_cross_attn = SpeechAttention(config.dim, config[InfiniteTalk])

    def forward(self, x: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """Run `Block.forward`; with two speakers, the queries and keys of self-attention also position the tokens."""
        if inputs.audio_context is None:
            return super().forward(x, inputs)
        speech_keys, masks = self.audio_cross_attn.speech_keys(inputs.audio_context), inputs.audio_context.speakers
        if masks is None:
            return super().forward(x, replace(inputs, audio_context=speech_keys))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            speech_keys.positions = self.positions(q, k, masks, speech_keys.speech)
            return inputs.attend(q, k, v)

        return super().forward(x, replace(inputs, audio_context=speech_keys, attend=attend))

    def used_by_slices(self) -> list[nn.Module]:
        """The modules that each slice of tokens goes through, those of the attention to speech included."""
        return [*super().used_by_slices(), self.audio_cross_attn.q_linear, self.audio_cross_attn.proj]

    def between(self, x: torch.Tensor, s: slice, inputs: BlockInputs) -> None:
        """Add the attention to speech to x, the slice `s` of this rank's tokens, in place."""
        if inputs.audio_context is not None and x.shape[1]:
            y = self.audio_cross_attn(self.norm_x(x, inputs.compute_dtype), inputs.audio_context, s)
            x.add_(y, alpha=inputs.audio_context.speech.scale)

    def positions(self, q: torch.Tensor, k: torch.Tensor, masks: torch.Tensor, speech: Speech) -> torch.Tensor:
        """The position [B, n] of each token on the line of the speakers, from the queries and keys [B, n, heads, d] of
        self-attention and the speakers' masks. All ranks that share the sequence or the heads call this together."""
        shown = q.new_zeros(q.shape[0], masks.shape[-1], *q.shape[2:])  # as values, for the weight of each mask
        shown[..., : masks.shape[1]] = masks.transpose(1, 2).unsqueeze(2)
        looks = few_keys(q, speech.first_keys(k), shown)[..., : masks.shape[1]].float().sum(dim=2)
        looks = self.over_heads(looks.contiguous()) / (self.num_heads * masks.float().sum(-1).unsqueeze(1) + _CLOSE)
        return speaker_positions(looks, speech.over)


def speaker_positions(looks: torch.Tensor, over: OverSequence | None) -> torch.Tensor:
    """Positions [B, n] on the line of the speakers, from each token's attention `looks` [B, n, masks] to the masks.

    A token belongs to the mask to which it attends most. Its position moves along this speaker's part of the line with
    its attention to the speaker, relative to the least and largest attention of all tokens of the video.
    """
    most, least = _extremes(looks[..., :2], over)
    starts = torch.tensor(_SPEAKER_STARTS, device=looks.device)
    along = (looks[..., :2] - least) / (most - least + _CLOSE) * _SPAN + starts
    no_speaker = torch.full_like(along[..., :1], _NO_SPEAKER)
    choice = looks.argmax(dim=-1, keepdim=True)
    return torch.cat([along, no_speaker], dim=-1).gather(-1, choice).squeeze(-1)


def _extremes(x: torch.Tensor, over: OverSequence | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest and smallest numbers [B, 1, c] of x [B, n, c] over the tokens of all ranks; a rank may have none."""
    both = torch.stack([x, -x])
    largest = both.amax(dim=2) if x.shape[1] else both.new_full((2, x.shape[0], x.shape[2]), -torch.inf)
    if over is not None:
        largest = over.largest(largest)
    return largest[0].unsqueeze(1), -largest[1].unsqueeze(1)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last dimension of x [..., tokens, heads, d] by angles proportional to
    `positions` [..., tokens]; the result is in the dtype of x."""
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1]
    angles = positions.float().unsqueeze(-1) / _BASE**pairs
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class InfiniteTalkModel(WanModel):
    """A DiT whose tokens attend to speech."""

    block = InfiniteTalkBlock

    def asks_other_ranks(self, conditioning: Conditioning) -> bool:
        """Whether the conditioning has two speakers, between whom each block decides for all tokens together."""
        return conditioning.speakers is not None or super().asks_other_ranks(conditioning)

    def audio_context(self, grid: Grid, part: Part, conditioning: Conditioning, device: torch.device) -> Speech | None:
        """The speech of all frames, for the video tokens `part`; None without speech."""
        if conditioning.audio is None:
            return None
        audio, speakers = conditioning.audio.to(device, self.compute_dtype), conditioning.speakers
        speakers = None if speakers is None else speakers.to(device, self.compute_dtype)
        return Speech(audio, speakers, conditioning.options.audio_scale, grid, part, self.over_sequence)
