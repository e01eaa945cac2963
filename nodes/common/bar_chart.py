"""Stacked bars side by side, one for each GPU, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import ImageDraw

from . import drawing
from .drawing import INK, MARGIN, Colour, font

WIDTH = 1024  # pixels
LABELS, SUMS = 84, 108  # pixels left and right of the bars
BAR, ROW = 30, 38  # pixels: height of a bar, and from one to the next
LEFT, RIGHT = MARGIN + LABELS, WIDTH - MARGIN - SUMS
_LINE = 26
_DARK = (16, 17, 20)


@dataclass(frozen=True)
class Chart:
    """Bars whose values have one unit. A chart without bars shows its title and `note`.

    Args:
        parts: name and colour of each part of a bar.
        bars: for each bar its label, the values of its parts, and the words to the right of it.
        form: turns a value into words.
        note: a line under the title.
    """

    title: str
    parts: tuple[tuple[str, Colour], ...] = ()
    bars: tuple[tuple[str, tuple[float, ...], str], ...] = ()
    form: Callable[[float], str] = str
    note: str = ""

    @property
    def full(self) -> float:
        """The value of a bar as wide as the chart."""
        return max((sum(values) for _, values, _ in self.bars), default=0.0)

    @property
    def height(self) -> int:
        """Pixels from the top of the title to the space below the chart."""
        lines = 1 + bool(self.note) + (len(self._legend()) if self.bars else 0)
        return lines * _LINE + len(self.bars) * ROW + MARGIN

    def draw(self, pen: ImageDraw.ImageDraw, top: int) -> None:
        """Draw the chart on a canvas, its title `top` pixels below the upper edge."""
        pen.text((MARGIN, top), self.title, INK, font(18))
        top += _LINE
        if self.note:
            pen.text((MARGIN, top), self.note, INK, font(15))
            top += _LINE
        for label, values, behind in self.bars:
            pen.text((MARGIN, top + BAR / 2), label, INK, font(16), "lm")
            pen.text((RIGHT + 10, top + BAR / 2), behind, INK, font(15), "lm")
            self._draw_bar(pen, top, values)
            top += ROW
        for line in self._legend() if self.bars else ():
            self._draw_legend(pen, top, line)
            top += _LINE

    def _draw_bar(self, pen: ImageDraw.ImageDraw, top: int, values: Sequence[float]) -> None:
        scale = (RIGHT - LEFT) / self.full if self.full else 0.0
        start = 0.0
        for (_, colour), value in zip(self.parts, values, strict=True):
            left, right = round(LEFT + start * scale), round(LEFT + (start + value) * scale)
            start += value
            if right <= left:
                continue
            pen.rectangle((left, top, right - 1, top + BAR - 1), colour)
            words = self.form(value)
            if pen.textlength(words, font(15)) <= right - left - 8:
                pen.text(((left + right) / 2, top + BAR / 2), words, _on(colour), font(15), "mm")

    def _legend(self) -> list[list[tuple[str, Colour]]]:
        """The name of each part with its least and largest value among the bars, in lines of three."""
        entries = []
        for i, (name, colour) in enumerate(self.parts):
            least, most = (self.form(pick(values[i] for _, values, _ in self.bars)) for pick in (min, max))
            entries.append((f"{name}: {least}" + (f" to {most}" if most != least else ""), colour))
        return [entries[start : start + 3] for start in range(0, len(entries), 3)]

    def _draw_legend(self, pen: ImageDraw.ImageDraw, top: int, entries: Sequence[tuple[str, Colour]]) -> None:
        for i, (words, colour) in enumerate(entries):
            left = MARGIN + i * (WIDTH - 2 * MARGIN) // 3
            pen.rectangle((left, top + 3, left + 16, top + 17), colour, outline=INK)
            pen.text((left + 24, top + 10), words, INK, font(15), "lm")


def draw_charts(caption: str, charts: Sequence[Chart]) -> torch.Tensor:
    """Draw charts under each other, below a caption of one line or more.

    Returns:
        float32 [1, height, 1024, 3] from 0 to 1.
    """
    lines = caption.splitlines()
    head = MARGIN + len(lines) * _LINE + MARGIN // 2
    picture = drawing.canvas(WIDTH, head + sum(chart.height for chart in charts) + MARGIN // 2)
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + i * _LINE), line, INK, font(20 if i == 0 else 15))
    top = head
    for chart in charts:
        chart.draw(pen, top)
        top += chart.height
    return drawing.as_image(picture)


def _on(colour: Colour) -> Colour:
    """Letters that can be read on a colour."""
    red, green, blue = colour
    return _DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else INK
