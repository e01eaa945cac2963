"""The training data: short clips of coloured shapes that move over a background, with their captions.

The few numbers that describe a clip are drawn on the CPU from a seeded PCG64; the frames are drawn from them
with torch, many clips at once, on whatever device the training uses.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

import numpy as np
import torch

from ...wanvideo.example.tiny_text import COLOURS, SHAPES

FRAMES = 17
SIZE = 128
"""Frames and height = width in pixels of the clips the models are made for."""

PALETTE = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.14, 0.66, 0.22),
    "blue": (0.14, 0.28, 0.88),
    "yellow": (0.96, 0.86, 0.18),
    "purple": (0.60, 0.18, 0.74),
    "cyan": (0.18, 0.82, 0.88),
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.08),
}
"""RGB, 0 to 1."""

_DIAGONAL = math.sqrt(0.5)
MOTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and right": (_DIAGONAL, -_DIAGONAL),
    "up and left": (-_DIAGONAL, -_DIAGONAL),
    "down and right": (_DIAGONAL, _DIAGONAL),
    "down and left": (-_DIAGONAL, _DIAGONAL),
}
"""Phrase -> unit vector in the picture, x to the right and y down."""

RADIUS = (0.10, 0.15)  # of a circle with the shape's area, as a share of the picture's width
TRAVEL = (0.32, 0.46)  # from the first to the last frame, likewise
MARGIN = 0.02
SHADE = 0.15  # how much darker the background gets from one side to the other, at most
BRIGHTNESS = 0.06  # of a shape, either way
PAIRS = 0.3  # share of clips with two shapes
HELD_OUT_SHARE = 0.1

# A shape of the same area as the unit circle, and how far it reaches from its centre
_SQUARE = math.sqrt(math.pi) / 2
_TRIANGLE = math.sqrt(math.pi / (3 * math.sqrt(3)))
_REACH = {"circle": 1.0, "square": _SQUARE, "triangle": 2 * _TRIANGLE}

_NAMES = tuple(MOTIONS)


@dataclass(frozen=True)
class Combination:
    """What one shape's part of a caption says."""

    colour: str
    shape: str
    motion: str
    background: str

    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.motion} over a {self.background} background"


@functools.lru_cache(maxsize=2)
def combinations(held_out: bool) -> tuple[Combination, ...]:
    """The combinations for training, or those kept out of it; a hash of the caption decides."""
    every = (Combination(*parts) for parts in product(COLOURS, SHAPES, MOTIONS, COLOURS))
    return tuple(c for c in every if c.colour != c.background and _is_held_out(c) == held_out)


def _is_held_out(combination: Combination) -> bool:
    digest = hashlib.sha256(combination.caption().encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class Scenes:
    """B clips as numbers. Index 1 of the second axis is the second shape, drawn over the first."""

    shapes: np.ndarray  # [B], 1 or 2 in the clip
    colour: np.ndarray  # [B, 2] into COLOURS
    shape: np.ndarray  # [B, 2] into SHAPES
    motion: np.ndarray  # [B, 2] into MOTIONS
    background: np.ndarray  # [B] into COLOURS
    radius: np.ndarray  # [B, 2], as RADIUS
    start: np.ndarray  # [B, 2, 2], centre (x, y) in the first frame, 0 to 1
    shift: np.ndarray  # [B, 2, 2], way of the centre to the last frame
    brightness: np.ndarray  # [B, 2], factor
    shade: np.ndarray  # [B, 2], gradient (x, y) of the background's brightness

    def __len__(self) -> int:
        return len(self.shapes)

    def captions(self) -> list[str]:
        """One caption a clip."""
        return [self._caption(i) for i in range(len(self))]

    def _caption(self, i: int) -> str:
        parts = [
            f"a {COLOURS[self.colour[i, k]]} {SHAPES[self.shape[i, k]]} moves {_NAMES[self.motion[i, k]]}"
            for k in range(self.shapes[i])
        ]
        return f"{' and '.join(parts)} over a {COLOURS[self.background[i]]} background"

    def split(self, size: int) -> Iterator[Scenes]:
        """Runs of at most `size` clips."""
        for start in range(0, len(self), size):
            yield Scenes(*(getattr(self, f.name)[start : start + size] for f in fields(self)))


def generator(seed: int, stream: str) -> np.random.Generator:
    """Random numbers of their own for every use of one seed."""
    digest = hashlib.sha256(f"{stream} {seed}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))


def draw_scenes(rng: np.random.Generator, count: int, held_out: bool = False, pairs: float = PAIRS) -> Scenes:
    """Draw clips whose combinations are all for training, or all held out; `pairs` is the share with two shapes."""
    table = _table(held_out)
    first = table[rng.integers(len(table), size=count)]
    second, found = _partners(rng, table, first)
    both = np.stack([first, second], axis=1)
    colour, shape, motion = both[..., 0], both[..., 1], both[..., 2]
    radius = rng.uniform(*RADIUS, size=(count, 2))
    shift = np.array(list(MOTIONS.values()))[motion] * rng.uniform(*TRAVEL, size=(count, 2, 1))
    reach = (np.array([_REACH[name] for name in SHAPES])[shape] * radius + MARGIN)[..., None]
    low = reach + np.maximum(0, -shift)
    high = 1 - reach - np.maximum(0, shift)
    angle = rng.uniform(0, 2 * math.pi, size=count)
    strength = rng.uniform(0, SHADE, size=count)
    return Scenes(
        shapes=1 + (found & (rng.random(count) < pairs)),
        colour=colour,
        shape=shape,
        motion=motion,
        background=first[:, 3],
        radius=radius,
        start=low + (high - low) * rng.random((count, 2, 2)),
        shift=shift,
        brightness=rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS, size=(count, 2)),
        shade=np.stack([strength * np.cos(angle), strength * np.sin(angle)], axis=1),
    )


@functools.lru_cache(maxsize=2)
def _table(held_out: bool) -> np.ndarray:
    """[combinations, 4]: colour, shape, motion, background as indices."""
    rows = [
        (COLOURS.index(c.colour), SHAPES.index(c.shape), _NAMES.index(c.motion), COLOURS.index(c.background))
        for c in combinations(held_out)
    ]
    return np.array(rows)


def _partners(rng: np.random.Generator, table: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A second combination over the same background in another colour, and whether one was found."""
    second, found = first.copy(), np.zeros(len(first), dtype=bool)
    for background in range(len(COLOURS)):
        rows = np.flatnonzero(first[:, 3] == background)
        choices = table[table[:, 3] == background]
        if not len(rows) or not len(choices):
            continue
        second[rows] = choices[rng.integers(len(choices), size=len(rows))]
        found[rows] = second[rows, 0] != first[rows, 0]
    return second, found


def render(scenes: Scenes, frames: int = FRAMES, size: int = SIZE, device: torch.device | str = "cpu") -> torch.Tensor:
    """The clips, float32 [B, 3, frames, size, size] from -1 to 1, edges anti-aliased over one pixel."""

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)

    palette = on_device(np.array([PALETTE[name] for name in COLOURS]))
    pixel = (torch.arange(size, device=device) + 0.5) / size
    x, y = pixel.view(1, 1, 1, size), pixel.view(1, 1, size, 1)

    shade = on_device(scenes.shade)[:, :, None, None, None]
    light = 1 - SHADE / 2 + shade[:, 0] * (x - 0.5) + shade[:, 1] * (y - 0.5)
    background = palette[_indices(scenes.background, device)][:, :, None, None, None]
    video = (background * light.unsqueeze(1)).expand(-1, -1, frames, -1, -1)

    time = torch.linspace(0, 1, frames, device=device)[:, None]
    for k in range(2):
        present = on_device((scenes.shapes > k).astype(np.float32)).view(-1, 1, 1, 1)
        if not present.any():
            continue
        centre = on_device(scenes.start[:, None, k]) + time * on_device(scenes.shift[:, None, k])  # [B, T, 2]
        distance = _signed_distance(
            x - centre[..., 0, None, None],
            y - centre[..., 1, None, None],
            on_device(scenes.radius[:, k]).view(-1, 1, 1, 1),
            _indices(scenes.shape[:, k], device).view(-1, 1, 1, 1),
        )
        cover = (present * (0.5 - size * distance).clamp(0, 1)).unsqueeze(1)
        colour = palette[_indices(scenes.colour[:, k], device)] * on_device(scenes.brightness[:, k, None])
        video = torch.lerp(video, colour.clamp(max=1)[:, :, None, None, None], cover)
    return 2 * video - 1


def _indices(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def _signed_distance(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Distance to the edge, negative inside, near enough within a pixel of it."""
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - _SQUARE * radius
    sides = torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y)  # of a triangle that points up
    triangle = sides - _TRIANGLE * radius
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
