"""Says what moves where in a clip of scenes.py, without knowing its caption.

Every pixel gets the palette's nearest colour. The colour that covers most of the clip is the background; every
other one that keeps covering enough pixels, after the rim of each area is cut off, is a shape, and the line
through its centre of mass over the frames tells its direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F

from ...wanvideo.example.tiny_text import COLOURS, DIRECTIONS, EXAMPLE, SHAPES, tokenize
from .scenes import MOTIONS, PALETTE

SMALLEST_AREA = 0.004
"""Share of the picture, without the rim; the smallest shape keeps 0.02."""

SMALLEST_SHIFT = 0.12
"""Way from the first to the last frame as a share of the width; the shortest that is drawn is 0.32."""

VISIBLE_FRAMES = 0.6
RIM = 1  # pixels: where two colours meet, the mixture can lie nearest to a third


@dataclass(frozen=True)
class Scene:
    """Background colour, and the motion of each colour that moves over it ("still" below SMALLEST_SHIFT)."""

    background: str
    motions: dict[str, str]

    def __str__(self) -> str:
        moving = " and ".join(f"{colour} moves {motion}" for colour, motion in self.motions.items())
        return f"{moving or 'nothing'} over {self.background}"


def classify(video: torch.Tensor) -> Scene:
    """The scene of one clip [3, T, H, W] with values from -1 to 1."""
    nearest = _nearest_colours(video)
    areas = F.one_hot(nearest, len(COLOURS)).movedim(-1, 1).float()  # [T, colours, H, W]
    background = int(areas.sum((0, 2, 3)).argmax())
    size = 2 * RIM + 1
    cores = 1 - F.max_pool2d(1 - areas, size, stride=1, padding=RIM)
    covered = cores.mean((2, 3))  # [T, colours]
    motions = {}
    for index, colour in enumerate(COLOURS):
        seen = covered[:, index] >= SMALLEST_AREA
        if index != background and seen.float().mean() >= VISIBLE_FRAMES:
            motions[colour] = _motion(cores[seen, index], seen)
    return Scene(COLOURS[background], motions)


def prompted(prompt: str) -> Scene:
    """What a prompt of scenes.py asks for.

    Raises:
        ValueError: it is not such a prompt.
    """
    words = tokenize(prompt)
    if "over" not in words:
        raise ValueError(f"'{prompt}' names no background. Write it as in '{EXAMPLE}'.")
    middle = words.index("over")
    motions: dict[str, str] = {}
    colour = ""
    for before, word in pairwise(words[:middle]):
        if word in SHAPES:
            colour = before
        elif word in DIRECTIONS:
            motions[colour] = f"{motions[colour]} and {word}" if colour in motions else word
    background = next((word for word in words[middle:] if word in COLOURS), "")
    return Scene(background, motions)


def _nearest_colours(video: torch.Tensor) -> torch.Tensor:
    """Index into COLOURS for each pixel, [T, H, W]."""
    pixels = (video.float().permute(1, 2, 3, 0) + 1) / 2
    palette = torch.tensor([PALETTE[name] for name in COLOURS], device=video.device)
    return torch.cdist(pixels.flatten(0, 2), palette).argmin(1).view(pixels.shape[:3])


def _motion(cores: torch.Tensor, seen: torch.Tensor) -> str:
    """The direction of the line fitted through the centres of an area over the frames in which it is seen."""
    height, width = cores.shape[1:]
    mass = cores.sum((1, 2))
    x = (cores.sum(1) @ torch.arange(width, device=cores.device).float()) / mass / width
    y = (cores.sum(2) @ torch.arange(height, device=cores.device).float()) / mass / height
    time = torch.nonzero(seen).flatten().float() / (len(seen) - 1)
    time = time - time.mean()
    shift = torch.stack([(time * x).sum(), (time * y).sum()]) / time.square().sum()
    if shift.norm() < SMALLEST_SHIFT:
        return "still"
    directions = torch.tensor(list(MOTIONS.values()), device=shift.device)
    return tuple(MOTIONS)[int((directions @ shift).argmax())]
