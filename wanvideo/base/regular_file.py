"""Opens the files that models are read from: regular files alone, so that nothing waits or acts, and with what tells a
file from a changed one."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .tensor_info import CheckpointError, unreadable


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from another file and from its own later content.

    Args:
        modified, changed: the times in ns at which the content was last written, and at which anything about the file
            last changed. Programs can set the first time, and not the second.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileIdentity:
        """The identity of an open file as it is now."""
        now = os.fstat(file.fileno())
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)

    def has_content_of(self, other: FileIdentity) -> bool:
        """Whether an open file, which may have got another name or none, has not been written since it was `other`."""
        return (self.size, self.modified) == (other.size, other.modified)


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for reading; whatever else `path` is, neither waits for it nor acts on it.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is a folder, a pipe or a device.
    """
    _refuse_unless_regular(path, _stat(path))  # before it is opened, which acts on some devices
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from error
    file = os.fdopen(descriptor, "rb")
    try:
        _refuse_unless_regular(path, os.fstat(descriptor))  # again: it may have been replaced
    except CheckpointError:
        file.close()
        raise
    return file


def path_of(file: BinaryIO) -> str:
    """A path of the open file itself, whatever has become of its name, for libraries that open files by path."""
    return f"/proc/self/fd/{file.fileno()}"


def not_opened_again(path: str) -> CheckpointError:
    """The error that tells a user that the safetensors library could not open an open file by its `path_of`.

    The library then says that there is no such file, whatever the cause is.
    """
    return CheckpointError(
        f"{Path(path).name} is open, and the safetensors library cannot open it once more. Raise the number of files "
        "that ComfyUI's process may have open (ulimit -n), and see that /proc is mounted."
    )


def stamp_of(identity: FileIdentity, header: bytes) -> str:
    """A text that changes with a file and with its header, whose bytes are `header` or a digest of them."""
    return hashlib.blake2b(repr(identity).encode() + header, digest_size=16).hexdigest()


def changed(path: str, when: str) -> CheckpointError:
    """The error that tells a user that the file at `path` changed at a time such as "after it was queued"."""
    return CheckpointError(f"{Path(path).name} changed {when}. Queue the prompt again, once the file is whole.")


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError:  # a NUL or half a surrogate pair
        raise CheckpointError("The name of the model is none that a file can have. Choose another file.") from None


def _refuse_unless_regular(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{Path(path).name} is a folder, a pipe or a device, and no file that holds a model. Choose a file."
        )
