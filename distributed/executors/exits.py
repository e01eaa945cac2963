"""How a process of a pool ended, in words, and what it needs of the machine that it did not get."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..protocol.pool_errors import Failure, PoolError, WorkerDied

_HINTS = {
    "SIGKILL": " (the system does that when host memory runs out)",
    "SIGBUS": " (a file that was being read has become shorter, or memory is full)",
}
_FAULTS = {"SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS"}
"""Signals that a process gets for what it does itself."""
_TELLING = re.compile(r"error|exception|what\(\)|terminate|fatal|abort|fail|cannot|can't", re.IGNORECASE)
_NO_LIMIT = "no limit"


class StartError(PoolError):
    """The ranks cannot start on this machine as it is, and will not by being asked again."""


class Crashed(WorkerDied):
    """A process has ended by a fault of its own, and may have said on the console what it was."""


def death_of(title: str, pid: int | None, exitcode: int) -> WorkerDied:
    """The error that the end of a process is.

    Args:
        title: who it was.
        exitcode: its exit status, or minus the number of the signal that ended it.
    """
    if exitcode >= 0:
        return Crashed(f"{title} (pid {pid}) ended with status {exitcode}.")
    name = signal_name(-exitcode)
    kind = Crashed if name in _FAULTS else WorkerDied
    return kind(f"{title} (pid {pid}) was ended by {name}{_HINTS.get(name, '')}.")


def signal_name(number: int) -> str:
    """The name of a signal; of a real-time signal without a name of its own, its distance from the first one."""
    try:
        return signal.Signals(number).name
    except ValueError:
        first = int(signal.SIGRTMIN)
        return f"SIGRTMIN+{number - first}" if number > first else f"signal {number}"


def deaths(found: Sequence[WorkerDied]) -> Failure:
    """The failure that several deaths at once are."""
    kind = next((type(death) for death in found if isinstance(death, Crashed)), WorkerDied)
    return Failure.of(kind(" ".join(str(death) for death in found)))


def with_cause(failure: Failure, said: Sequence[str], starting: bool) -> Failure:
    """The failure with its cause, as far as its own text or what the processes have said tells of one.

    Args:
        said: the last lines of the processes on the console.
        starting: whether the ranks were not yet up. A cause that the machine is then has its remedy in the text.
    """
    died = WorkerDied.__name__ in failure.kinds
    if failure.for_user and not died:
        return failure
    heard = [line for line in said if Crashed.__name__ in failure.kinds]
    if starting:
        for line in [failure.text, *reversed(heard)]:
            if remedy := remedy_of(line):
                quoted = "" if line == failure.text else f": {line.rstrip('.')}"
                return Failure.of(StartError(f"{failure.text.rstrip('.')}{quoted}. {remedy}"))
    if heard:
        last = next((line for line in reversed(heard) if _TELLING.search(line)), heard[-1])
        return replace(failure, text=f'{failure.text} Last on the console: "{last}".')
    return failure if failure.for_user else replace(failure, text=f"{failure.text.rstrip('.')}.")


def refused(error: OSError | RuntimeError) -> StartError:
    """The error of a machine that does not even let the launcher start."""
    remedy = remedy_of(str(error)) or "Let the user who runs ComfyUI do that, and queue the prompt again."
    return StartError(f"The pool's launcher cannot be started: {str(error).rstrip('.')}. {remedy}")


def remedy_of(words: str) -> str:
    """What to do about an error whose words tell of something that the machine has too little of; else ""."""
    return next((lack.remedy() for lack in _LACKS if any(word in words for word in lack.words)), "")


@dataclass(frozen=True)
class _Lack:
    """Something that the machine has too little of.

    Args:
        words: with which the system, Python, torch and NCCL say so.
        remedy: gives sentences on how much there is and on how to get more.
    """

    words: tuple[str, ...]
    remedy: Callable[[], str]


def _files() -> str:
    return (
        f"A process may have {_limit('RLIMIT_NOFILE')} open files here (ulimit -n), which is too few. Raise "
        "that in the shell or the service that starts ComfyUI, for example by: ulimit -n 4096."
    )


def _processes() -> str:
    space = _limit("RLIMIT_AS", 2**30)
    also = "" if space == _NO_LIMIT else f", or {space} GiB of address space (ulimit -v) have no room for another"
    return (
        f"The system starts no more processes or threads for this user, who may have {_limit('RLIMIT_NPROC')} "
        f"(ulimit -u), or in this container (its pids limit){also}. Raise that, or end other programs."
    )


def _memory() -> str:
    space = _limit("RLIMIT_AS", 2**30)
    if space == _NO_LIMIT:
        return "The system gives out no more memory. Close other programs, or give this machine or container more."
    return (
        f"A process may have {space} GiB of address space here (ulimit -v), which is too little. Lift that in the "
        "shell or the service that starts ComfyUI, for example by: ulimit -v unlimited."
    )


def _disk() -> str:
    folders = dict.fromkeys([_temporary_folder(), "/dev/shm", os.path.expanduser("~")])
    room = ", ".join(f"{folder} {_free(folder)}" for folder in folders if os.path.isdir(folder))
    return f"Free space on this machine: {room}. Make room where there is none (in a container: docker run --shm-size)."


def _file_size() -> str:
    return (
        f"A process may write {_limit('RLIMIT_FSIZE')} bytes to a file here (ulimit -f), which is too few. "
        "Lift that in the shell or the service that starts ComfyUI, for example by: ulimit -f unlimited."
    )


def _read_only() -> str:
    return (
        f"The workers write temporary files to {_temporary_folder()} and caches below {os.path.expanduser('~')}. "
        "Let the user who runs ComfyUI write there, or point TMPDIR and HOME to other folders."
    )


_LACKS = (
    _Lack(("Too many open files",), _files),
    _Lack(("Resource temporarily unavailable", "can't start new thread"), _processes),
    _Lack(("Cannot allocate memory", "failed to map segment", "MemoryError", "std::bad_alloc"), _memory),
    _Lack(("No space left on device", "Disk quota exceeded"), _disk),
    _Lack(("File too large",), _file_size),
    _Lack(("Read-only file system",), _read_only),
)


def _limit(which: str, unit: int = 1) -> str:
    import resource  # Linux alone has it, and Windows gets this far to be refused in words

    soft, _ = resource.getrlimit(getattr(resource, which))
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else f"{soft / unit:.3g}" if unit > 1 else str(soft)


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none in which this process can write, which may be what is wrong
        return os.environ.get("TMPDIR", "/tmp")


def _free(folder: str) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
