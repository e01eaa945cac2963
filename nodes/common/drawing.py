"""Colours, fonts and canvases of all status pictures, and the conversion of a canvas to ComfyUI's IMAGE."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFont

Colour = tuple[int, int, int]

ORANGE, SKY, GREEN, YELLOW = (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)
BLUE, RED, PINK, GREY = (0, 114, 178), (213, 94, 0), (204, 121, 167), (150, 150, 150)
# Eight colours that are told apart with any kind of colour vision (Okabe and Ito, 2008); grey for their black.
COLOURS: tuple[Colour, ...] = (ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY)
BACK: Colour = (24, 26, 30)
INK: Colour = (235, 235, 235)
MARGIN = 16  # pixels


def canvas(width: int, height: int) -> Image.Image:
    """Return an empty picture of so many pixels."""
    return Image.new("RGB", (width, height), BACK)


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the font that comes with Pillow, in so many pixels."""
    return ImageFont.load_default(size)


def as_image(picture: Image.Image) -> torch.Tensor:
    """Return a picture as ComfyUI's IMAGE: float32 [1, height, width, 3] from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).unsqueeze(0)
