"""Starting the launcher of a pool, and hanging up on it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from ..protocol.messages import PoolReady, Start, encode
from ..protocol.specs import PoolSettings

_CLOSE_SECONDS = 3.0
_BOOTSTRAP = Path(__file__).resolve().parents[2] / "bootstrap.py"


def worker_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The environment of a launcher and its workers.

    ComfyUI puts its choice of torch's allocator (cudaMallocAsync) into its own; where weights live is counted in the
    segments of torch's native one (see offload.py).
    """
    # multiprocessing starts workers with `python -c`, which looks for modules in the working directory
    environment = {**ours, "PYTHONSAFEPATH": "1"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        kept = [option for option in environment.pop(name, "").split(",") if "cudaMallocAsync" not in option]
        if any(kept):
            environment[name] = ",".join(kept)
    return environment


class PoolProcesses:
    """A launcher with its workers, and our end of the line to it."""

    def __init__(self, settings: PoolSettings):
        ours, theirs = socket.socketpair()
        with theirs:
            self.launcher = subprocess.Popen(
                [sys.executable, str(_BOOTSTRAP), "distributed.executors.launcher", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=worker_environment(os.environ),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the console is for ComfyUI; the pool ends with it
            )
        self.connection = Connection(ours.detach())
        self.ready: PoolReady | None = None
        self.connection.send_bytes(encode(Start(settings, os.getpid())))

    def stop(self) -> None:
        """Hang up; the launcher then ends its workers and itself."""
        self.connection.close()
        try:
            self.launcher.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()

    def exit_reason(self) -> str:
        """How the launcher ended, as a sentence."""
        try:
            code = self.launcher.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"The pool's launcher (pid {self.launcher.pid}) closed its connection."
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"The pool's launcher (pid {self.launcher.pid}) was ended {how}."
