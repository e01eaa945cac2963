"""What a forward is told in plain data; without torch, so that every process can pass it on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeOptions:
    """How far apart and from where on the tokens of a video are placed: position = shift + scale * index."""

    scale_t: float = 1.0
    scale_y: float = 1.0
    scale_x: float = 1.0
    shift_t: float = 0.0
    shift_y: float = 0.0
    shift_x: float = 0.0


PLAIN_ROPE = RopeOptions()


@dataclass(frozen=True)
class Options:
    """The part of a `Conditioning` that is plain data.

    Args:
        reference_frames: frames in front of the latent that are embedded as a reference (see `extended`).
        vace_strengths: one for each VACE context.
        skip_blocks: indices of transformer blocks to leave out.
        rope: positions of the tokens.
    """

    reference_frames: int = 0
    vace_strengths: tuple[float, ...] = ()
    skip_blocks: tuple[int, ...] = ()
    rope: RopeOptions = PLAIN_ROPE


PLAIN = Options()
