"""What a forward is told in plain data; without torch, so that every process can pass it on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeOptions:
    """Positions of the tokens of a video along its three axes: position = shift + scale * index."""

    scale_t: float = 1.0
    scale_y: float = 1.0
    scale_x: float = 1.0
    shift_t: float = 0.0
    shift_y: float = 0.0
    shift_x: float = 0.0


PLAIN_ROPE = RopeOptions()


@dataclass(frozen=True)
class Segment:
    """A grid of tokens of its own behind those of the video, in the same sequence.

    Args:
        rope: positions of its tokens.
        stretched: its rows and columns span those of the video: each token stands in the middle of what it covers.
        turn: angle by which its tokens are turned beside, times the frequency of each pair; 0 is that of the video.
    """

    frames: int
    rows: int
    columns: int
    rope: RopeOptions = PLAIN_ROPE
    stretched: bool = False
    turn: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the grid."""
        return self.frames, self.rows, self.columns

    @property
    def tokens(self) -> int:
        """The number of tokens of the grid."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class Options:
    """The part of a `Conditioning` that is plain data.

    Args:
        reference_frames: frames in front of the latent that are embedded as a reference (see `extended`).
        vace_strengths: one for each VACE context.
        skip_blocks: indices of transformer blocks to leave out.
        rope: positions of the tokens.
        reference_rope: positions of the reference frames, where these are not the first of the video.
        tail: what the tokens of `Conditioning.tail` are.
        fps: frames a second of a video that is made coarse first (WanDancer); 0 for one that is not.
        audio_scale: how strongly the music of WanDancer, or the speech of InfiniteTalk, is added.
    """

    reference_frames: int = 0
    vace_strengths: tuple[float, ...] = ()
    skip_blocks: tuple[int, ...] = ()
    rope: RopeOptions = PLAIN_ROPE
    reference_rope: RopeOptions | None = None
    tail: tuple[Segment, ...] = ()
    fps: float = 0.0
    audio_scale: float = 1.0

    @property
    def tail_tokens(self) -> int:
        """Tokens of the sequence that are not those of the video."""
        return sum(segment.tokens for segment in self.tail)


PLAIN = Options()
