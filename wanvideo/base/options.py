"""The options of a forward as plain data, without torch, so that every process can pass them on."""

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
class ContextGrid:
    """A grid of context tokens, which follow the tokens of the video in the sequence.

    Args:
        rope: positions of the tokens.
        stretched: whether the rows and columns span the video's, each token in the middle of the area that it covers.
        rope_phase: phase that sets these tokens apart from the video's, whose phase is 0: the rotary embedding rotates
            each pair by this number times the pair's frequency more.
    """

    frames: int
    rows: int
    columns: int
    rope: RopeOptions = PLAIN_ROPE
    stretched: bool = False
    rope_phase: int = 0

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
        extra_frames: frames behind the latent that are not of the video (see `extended`).
        vace_strengths: the strength of each VACE control video.
        skip_blocks: indices of transformer blocks to leave out.
        rope: positions of the tokens.
        reference_rope: positions of the reference frames; None where they are the first frames of the video.
        context_grids: the grids of the context tokens, in the order of `Conditioning.context_videos`.
        fps: frames a second of WanDancer's coarse video; 0 for any other video.
        audio_scale: how strongly the music of WanDancer, or the speech of InfiniteTalk, is added.
    """

    reference_frames: int = 0
    vace_strengths: tuple[float, ...] = ()
    skip_blocks: tuple[int, ...] = ()
    rope: RopeOptions = PLAIN_ROPE
    reference_rope: RopeOptions | None = None
    context_grids: tuple[ContextGrid, ...] = ()
    fps: float = 0.0
    audio_scale: float = 1.0
    extra_frames: int = 0

    @property
    def context_tokens(self) -> int:
        """The number of context tokens, which follow the tokens of the video in the sequence."""
        return sum(grid.tokens for grid in self.context_grids)


PLAIN = Options()
