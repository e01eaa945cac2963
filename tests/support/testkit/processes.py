"""What /proc tells about the processes of a pool."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not, unless some of its threads are still about to end."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except OSError:
        return False
    return state not in ("Z", "X") or threads > 1


def descendants(pid: int) -> set[int]:
    """The processes below `pid`."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, set()).add(int(entry.name))
    found, todo = set(), [pid]
    while todo:
        below = children.get(todo.pop(), set())
        found |= below
        todo += below
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """The time that processors have spent on the processes, which does not depend on what else the machine does."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime of proc(5), whose fields count from the pid
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_gone(pids: Iterable[int], seconds: float) -> set[int]:
    """Wait until none of `pids` runs; those that still do after `seconds`."""
    deadline = time.monotonic() + seconds
    left = {pid for pid in pids if alive(pid)}
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = {pid for pid in left if alive(pid)}
    return left


def private_bytes(pid: int) -> int:
    """Host memory that no other process shares (RssAnon)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"process {pid} has no RssAnon")


def open_files(pid: int) -> set[str]:
    """What the process has open or mapped, by the names that /proc gives."""
    names = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            names.add(str(entry.readlink()))
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            names.add(fields[5])
    return names


def listening(pids: Iterable[int]) -> list[str]:
    """Local addresses (hexadecimal, as /proc has them) of the TCP and UDP sockets on which `pids` wait for others."""
    inodes = {name[8:-1] for pid in pids for name in open_files(pid) if name.startswith("socket:[")}
    addresses = []
    for table, waiting in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[9] in inodes and fields[3] == waiting:
                addresses.append(fields[1].partition(":")[0])
    return addresses
