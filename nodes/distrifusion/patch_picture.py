"""A picture of a video's patches: the frame with its bands of rows, and the strip of its latent frames."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from ...distributed.approximate.patch_layout import Patch, PatchLayout
from ..common import drawing
from ..common.drawing import COLOURS, INK, MARGIN, font

_TINT, _HATCH = 110, 150  # opacity, of 255
_WIDTH, _TALLEST, _STRIP = 960, 640, 190  # pixels

Box = tuple[float, float, float, float]


def draw_layout(layout: PatchLayout, caption: str, frame: torch.Tensor | None = None) -> torch.Tensor:
    """Draw the patches of a layout: bands of rows over a frame, runs of frames on a strip of latent frames.

    Args:
        caption: the first line of the picture.
        frame: [H, W, 3] from 0 to 1; grey without.

    Returns:
        float32 [1, height, 992, 3] from 0 to 1.
    """
    picture = _background(layout, frame)
    height = max(1, min(_TALLEST, round(_WIDTH * picture.height / picture.width)))
    by_time = any(patch.frames != (0, layout.grid.frames) for patch in layout.patches)
    by_rows = any(patch.rows != (0, layout.grid.rows) for patch in layout.patches)
    show_frame, show_strip = by_rows or not by_time, by_time
    parts = [(height, _frame)] * show_frame + [(_STRIP, _strip)] * show_strip
    legend = 34 * (1 + any(layout.border))
    total = 3 * MARGIN + 26 + legend + sum(part[0] + MARGIN + 24 * show_strip for part in parts)
    canvas = drawing.canvas(_WIDTH + 2 * MARGIN, total)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), caption, INK, font(20))
    top = 2 * MARGIN + 26
    for part_height, part in parts:
        if show_strip:
            pen.text((MARGIN, top), _title(layout, part), INK, font(16))
            top += 24
        canvas.paste(part(layout, picture, part_height), (MARGIN, top))
        top += part_height + MARGIN
    _legend(canvas, layout, top)
    return drawing.as_image(canvas)


def _background(layout: PatchLayout, frame: torch.Tensor | None) -> Image.Image:
    if frame is None:
        return Image.new("RGB", (layout.grid.columns * 16, layout.grid.rows * 16), (96, 96, 96))
    pixels = (frame.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels[..., :3].numpy()).convert("L").convert("RGB")  # the colours are the ranks'


def _title(layout: PatchLayout, part: object) -> str:
    if part is _frame:
        return "latent frame 0"
    rows = "" if len({patch.rows for patch in layout.patches}) == 1 else ", each with its rows from top to bottom"
    return f"all {layout.grid.frames} latent frames, from left to right{rows}"


def _frame(layout: PatchLayout, picture: Image.Image, height: int) -> Image.Image:
    """The patches of latent frame 0 over the picture."""
    width = max(1, min(_WIDTH, round(height * picture.width / picture.height)))
    base = picture.resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    unit = height / layout.grid.rows
    boxes = {
        rank: (0.0, patch.rows[0] * unit, float(width), patch.rows[1] * unit)
        for rank, patch in enumerate(layout.patches)
        if patch.frames[0] == 0
    }
    return _paint(base, boxes, _between_rows(layout, unit, width, height), layout.counts)


def _strip(layout: PatchLayout, picture: Image.Image, height: int) -> Image.Image:
    """Every latent frame as a narrow column, its rows from top to bottom."""
    grid = layout.grid
    column, unit = _WIDTH / grid.frames, height / grid.rows
    base = Image.new("RGBA", (_WIDTH, height))
    thumbnail = _cropped(picture, max(2, round(column) - 2), height)
    for frame in range(grid.frames):
        base.paste(thumbnail, (round(frame * column) + 1, 0))
    boxes = {
        rank: (patch.frames[0] * column, patch.rows[0] * unit, patch.frames[1] * column, patch.rows[1] * unit)
        for rank, patch in enumerate(layout.patches)
    }
    near = layout.border[0] * column
    borders = _inner(layout.patches, "frames", column, _WIDTH) if near else []
    fresh = [(at - near, 0.0, at + near, float(height)) for at in borders]
    return _paint(base, boxes, fresh + _between_rows(layout, unit, _WIDTH, height), layout.counts)


def _between_rows(layout: PatchLayout, unit: float, width: int, height: int) -> list[Box]:
    """The fresh strips along the borders between bands of rows, each `unit` pixels high."""
    near = layout.border[1] * unit
    borders = _inner(layout.patches, "rows", unit, height) if near else []
    return [(0.0, at - near, float(width), at + near) for at in borders]


def _inner(patches: tuple[Patch, ...], axis: str, unit: float, end: float) -> list[float]:
    """The borders between patches along `axis`, in pixels."""
    starts = {getattr(patch, axis)[0] * unit for patch in patches}
    return sorted(at for at in starts if 0 < at < end)


def _cropped(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture at the shape wanted."""
    scaled = picture.resize((max(width, round(picture.width * height / picture.height)), height))
    left = (scaled.width - width) // 2
    return scaled.crop((left, 0, left + width, height))


def _paint(base: Image.Image, boxes: dict[int, Box], fresh: list[Box], counts: list[int]) -> Image.Image:
    """Tint each rank's box, hatch the areas whose tokens are exchanged fresh, draw the borders and the numbers."""
    tint = Image.new("RGBA", base.size)
    pen = ImageDraw.Draw(tint)
    for rank, box in boxes.items():
        pen.rectangle(box, (*COLOURS[rank % len(COLOURS)], _TINT))
    base = Image.alpha_composite(base, tint)
    base.paste((255, 255, 255), mask=_hatching(base.size, fresh))
    pen = ImageDraw.Draw(base)
    for rank, box in boxes.items():
        pen.rectangle(box, outline=(255, 255, 255), width=2)
        label = f"rank {rank}\n{100 * counts[rank] / sum(counts):.0f} %"
        _label(pen, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), label, box)
    return base.convert("RGB")


def _hatching(size: tuple[int, int], boxes: list[Box]) -> Image.Image:
    """Diagonal lines inside `boxes`."""
    lines, inside = Image.new("L", size), Image.new("L", size)
    pen = ImageDraw.Draw(lines)
    for start in range(-size[1], size[0], 9):
        pen.line((start, size[1], start + size[1], 0), _HATCH, 2)
    pen = ImageDraw.Draw(inside)
    for box in boxes:
        pen.rectangle(box, 255)
    empty = Image.new("L", size)
    return Image.composite(lines, empty, inside)


def _label(pen: ImageDraw.ImageDraw, centre: tuple[float, float], text: str, box: Box) -> None:
    if box[3] - box[1] < 52:  # a low band has room for one line
        text = text.replace("\n", ", ")
    if box[2] - box[0] < 90:
        text = text.split("\n")[0].removeprefix("rank ").split(",")[0]
    size = 20 if box[2] - box[0] > 90 else 16
    pen.multiline_text(
        centre, text, (255, 255, 255), font(size), "mm", 2, "center", stroke_width=2, stroke_fill=(0, 0, 0)
    )


def _legend(canvas: Image.Image, layout: PatchLayout, top: int) -> None:
    pen = ImageDraw.Draw(canvas)
    grid = layout.grid
    pen.text(
        (MARGIN, top + 4),
        f"{grid.frames} latent frames of {grid.rows} x {grid.columns} tokens; each colour is one rank's patch",
        INK,
        font(16),
    )
    if not any(layout.border):
        return
    swatch = (MARGIN, top + 36, MARGIN + 48, top + 58)
    pen.rectangle(swatch, (96, 96, 96))
    canvas.paste((255, 255, 255), mask=_hatching(canvas.size, [swatch]))
    pen.text((MARGIN + 60, top + 37), f"fresh in every step: {_border_words(layout.border)}", INK, font(16))


def _border_words(border: tuple[int, int]) -> str:
    one, more = ("latent frame", "row of tokens"), ("latent frames", "rows of tokens")
    words = [f"{n} {one[i] if n == 1 else more[i]}" for i, n in enumerate(border) if n]
    return " and ".join(words) + " on either side of a border"
