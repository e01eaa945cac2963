"""How much memory the host of this process has, and how much of it may be taken for long."""

from __future__ import annotations

from pathlib import Path


def host_memory() -> tuple[int, int]:
    """Bytes of the host's memory that are available, and all of them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return available, total


def host_room() -> int:
    """Bytes of host memory that may be taken for long: what is available less a reserve for everybody else."""
    available, total = host_memory()
    return available - total // 20
