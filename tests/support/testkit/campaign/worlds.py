"""The surroundings that a client is started in: another user, a home that nobody can write to, disks of their own."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testkit.campaign import faults

NOBODY = 65534  # user and group, the same on all Linux systems
DISK_BYTES = 2**20
_FILLING, _CHUNK = "filling", 2**14

_IN_NAMESPACE = {  # as shell commands in a mount namespace of its own
    faults.DISK: 'mount -t tmpfs -o size=1m campaign "$TMPDIR" && mount -t tmpfs -o size=1m campaign /dev/shm',
    faults.HOME: 'mount --bind "$HOME" "$HOME" && mount -o remount,ro,bind "$HOME"',
}


@dataclass(frozen=True)
class World:
    """Surroundings of a kind of fault; of any other kind, those of this process.

    Args:
        kind: of the fault.
        folder: in which the client's files lie: its HOME among them, and its TMPDIR.
    """

    kind: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What differs from the environment of this process."""
        home = "/nonexistent" if self.kind == faults.USER else str(self.folder / "home")
        return {"HOME": home, "TMPDIR": str(self.folder / "tmp")}

    def prefix(self, python: str) -> list[str]:
        """What stands before a command of `python`; it keeps the process id."""
        lines = [_IN_NAMESPACE[self.kind]] if self.kind in _IN_NAMESPACE else []
        if self.kind == faults.USER and (closed := _closed_to_others(python)):
            lines += _opened(closed, Path(python).resolve().parents[1], self.folder / "interpreter")
        switch = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        switch = switch if self.kind == faults.USER else []
        return ["unshare", "-m", "sh", "-c", f'{" && ".join(lines)} && exec "$@"', "sh", *switch] if lines else switch

    def prepare(self) -> None:
        """Make the folders, which belong to whom the client runs as."""
        for name in ("home", "tmp", "interpreter"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        owner = NOBODY if self.kind == faults.USER else os.getuid()
        if os.getuid() == 0:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, owner, owner, follow_symlinks=False)

    def interpreter(self, python: str) -> str:
        """A program that starts `python` in this world."""
        if not self.prefix(python):
            return python
        script = self.folder / "python-in-this-world"
        home, command = shlex.quote(self.environment["HOME"]), shlex.join([*self.prefix(python), python])
        script.write_text(f'#!/bin/sh\nHOME={home}\nexport HOME\nexec {command} "$@"\n')
        script.chmod(0o755)
        return str(script)


def possible(kind: str, python: str) -> bool:
    """Whether this process may start clients of `python` in the world of a kind of fault."""
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        os.chmod(folder, 0o755)
        world = World(kind, Path(folder))
        world.prepare()
        of_its_own = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', '']).returncode)"
        command = [*world.prefix(python), python, "-c", of_its_own]
        try:
            tried = subprocess.run(command, env={**os.environ, **world.environment}, capture_output=True, check=False)
        except OSError:  # no setpriv, no unshare
            return False
    return tried.returncode == 0


def _closed_to_others(python: str) -> Path | None:
    """A folder above an interpreter which other users may not enter, such as a home; None where there is none."""
    above = reversed(Path(python).resolve().parents)
    return next((folder for folder in above if not folder.stat().st_mode & stat.S_IXOTH), None)


def _opened(closed: Path, prefix: Path, place: Path) -> list[str]:
    """Shell commands after which all that there is in `closed` is the interpreter's `prefix`, and others may enter."""
    closed_, prefix_, place_ = (shlex.quote(str(path)) for path in (closed, prefix, place))
    return [
        f"mount --bind {prefix_} {place_}",
        f"mount -t tmpfs -o mode=755 campaign {closed_}",
        f"mkdir -p {prefix_}",
        f"mount --bind {place_} {prefix_}",
    ]


@contextlib.contextmanager
def filled(pid: int, folder: Path) -> Iterator[None]:
    """The disks at `folder` and /dev/shm, as the process sees them, are full in the block.

    Raises:
        RuntimeError: they are not the small disks of `faults.DISK`, but the machine's own.
    """
    places = [Path(f"/proc/{pid}/root{place}") for place in (folder, "/dev/shm")]
    for place in places:
        size = os.statvfs(place)
        if size.f_blocks * size.f_frsize > DISK_BYTES:
            raise RuntimeError(f"{place} is no small disk, and is not filled. The client has not come up.")
    try:
        for place in places:
            with (place / _FILLING).open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for _ in range(2 * DISK_BYTES // _CHUNK):  # more than there is room for, but never without an end
                    file.write(bytes(_CHUNK))
        yield
    finally:
        for place in places:
            with contextlib.suppress(OSError):  # gone with the process
                (place / _FILLING).unlink()
