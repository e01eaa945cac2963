"""Which processes a client has, what they leave behind, and what a client holds."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from testkit.processes import alive, descendants, open_files, private_bytes

MARK = "WAN_PARALLEL_CAMPAIGN"
"""An environment variable by which the processes of a campaign are found, whoever their parent is by now."""


@dataclass(frozen=True)
class Family:
    """The processes below a client, as far as there are any yet: 0, or none, for those that are not there.

    Args:
        workers: by rank.
    """

    launcher: int = 0
    zygote: int = 0
    workers: tuple[int, ...] = ()

    @property
    def pids(self) -> set[int]:
        return {self.launcher, self.zygote, *self.workers} - {0}


def family_of(client: int) -> Family:
    """The processes below a client. The launcher of the newest pool counts, if there are several."""
    launchers = [pid for pid in sorted(descendants(client)) if b"distributed.executors.launcher" in _command(pid)]
    if not launchers:
        return Family()
    launcher = launchers[-1]
    starters = [pid for pid in _children(launcher) if b"spawn_main" in _command(pid)]
    if len(starters) == 1:  # campaigns have no pool of one worker
        return Family(launcher, starters[0], tuple(_children(starters[0])))
    return Family(launcher, 0, tuple(starters))


def marked(mark: str) -> set[int]:
    """All living processes with this mark in their environment but this one."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() and alive(int(entry.name)):
                    found.add(int(entry.name))
    return found


def left_over(mark: str, client: int, seconds: float) -> set[int]:
    """Marked processes beside the client and one pool's that there still are after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        launcher = family_of(client).launcher
        known = {client, launcher, *(descendants(launcher) if launcher else ())}
        left = marked(mark) - known
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def shared_files(before: set[str], seconds: float = 2.0) -> set[str]:
    """Files in /dev/shm that were not there before and that nobody has open, after `seconds` of patience."""
    deadline = time.monotonic() + seconds
    while left := in_shared_memory() - before:
        if time.monotonic() > deadline:
            held = set()
            for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
                with contextlib.suppress(OSError):
                    held |= open_files(pid)
            return {name for name in left if f"/dev/shm/{name}" not in held}
        time.sleep(0.1)
    return set()


def in_shared_memory() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir("/dev/shm"))


@dataclass(frozen=True)
class Held:
    """What a client holds at rest."""

    descriptors: int
    threads: int
    nbytes: int


def held_by(pid: int) -> Held:
    """What the process holds now."""
    folder = Path(f"/proc/{pid}")
    return Held(len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), private_bytes(pid))


def _children(pid: int) -> list[int]:
    return sorted(child for child in descendants(pid) if _parent(child) == pid)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
