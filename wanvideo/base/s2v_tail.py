"""What lies behind the video of S2V, in the same sequence: where its tokens stand. Plain data, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .options import RopeOptions, Segment
from .variant_shapes import PACKED

PACKED_FRAMES = (1, 2, 16)
"""Frames of the video so far that each convolution of `PACKED` sees, the last one first."""

_SUBJECT_TIME, _SUBJECT_DISTANCE = 30, 9  # the subject stands at this frame, or so far behind the video


def segments_behind(
    video: Sequence[int], subject: Sequence[int] | None, so_far: Sequence[int] | None
) -> tuple[Segment, ...]:
    """The subject's tokens, and those of the video so far; arguments are (frames, height, width) of latents."""
    segments = []
    if subject is not None:
        first = max(_SUBJECT_TIME, video[0] + _SUBJECT_DISTANCE)
        segments.append(Segment(subject[0], subject[1] // 2, subject[2] // 2, RopeOptions(shift_t=float(first))))
    if so_far is not None:
        segments += _packed(so_far[1], so_far[2])
    return tuple(segments)


def _packed(height: int, width: int) -> Iterator[Segment]:
    """The last frame, and what lies farther back in fewer tokens, spread over the same rows and columns."""
    first = 0
    for frames, (size, rows, columns) in zip(PACKED_FRAMES, PACKED.values(), strict=True):
        first -= frames
        own = height // rows, width // columns
        scales = (_spread(length // 2, count) for length, count in zip((height, width), own, strict=True))
        scale_y, scale_x = scales
        rope = RopeOptions(shift_t=float(first), scale_y=scale_y, scale_x=scale_x)
        yield Segment(frames // size, *own, rope)


def _spread(length: int, count: int) -> float:
    """The step with which `count` positions go from the first of `length` to the last."""
    return (length - 1) / (count - 1) if count > 1 else 1.0
