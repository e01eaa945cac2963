"""The surroundings that a client is started in: another user, a home that nobody can write to, disks of their own."""

from __future__ import annotations

import contextlib
import os
import shlex
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

    @property
    def prefix(self) -> list[str]:
        """What stands before the command of the client, which keeps the process id."""
        if self.kind == faults.USER:
            return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        if self.kind in _IN_NAMESPACE:
            return ["unshare", "-m", "sh", "-c", f'{_IN_NAMESPACE[self.kind]} && exec "$@"', "sh"]
        return []

    def prepare(self) -> None:
        """Make the folders, which belong to whom the client runs as."""
        for name in ("home", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        owner = NOBODY if self.kind == faults.USER else os.getuid()
        if os.getuid() == 0:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, owner, owner, follow_symlinks=False)

    def interpreter(self, python: str) -> str:
        """A program that starts `python` in this world."""
        if not self.prefix:
            return python
        script = self.folder / "python-in-this-world"
        home = self.environment["HOME"]
        script.write_text(
            f'#!/bin/sh\nHOME={shlex.quote(home)}\nexport HOME\nexec {shlex.join([*self.prefix, python])} "$@"\n'
        )
        script.chmod(0o755)
        return str(script)


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
