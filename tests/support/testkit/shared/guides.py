"""The guides of the pack as text and as tables."""

from __future__ import annotations

import re

import testkit

ROOT = testkit.ROOT
GUIDE = (ROOT / "XDIT_USP_README.md").read_text(encoding="utf-8")
PATCHES = (ROOT / "OFFICIAL_DISTRIFUSION_README.md").read_text(encoding="utf-8")


def section(title: str, guide: str) -> str:
    return guide.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str, guide: str = GUIDE) -> list[list[str]]:
    """The cells of the tables of a section, without the line under the heads."""
    lines = [line for line in section(title, guide).splitlines() if re.match(r"\|(?!---)", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
