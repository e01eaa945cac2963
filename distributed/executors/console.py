"""What the processes of a pool write on the console: passed on, and the last lines kept for the user's message."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque

_LINES, _LENGTH = 30, 300
_OURS = "[WanParallel"
"""How lines of this pack begin: what they say is in the message already."""


class Console:
    """Lies between the processes of a pool and the console, that is, this process's own standard error.

    A process that could not start, or that a library has ended, says why there and nowhere else.

    Attributes:
        descriptor: the standard error for a process, until `given`.
    """

    def __init__(self) -> None:
        self._read, self.descriptor = os.pipe()
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._thread = threading.Thread(target=self._pass_on, name="wan-parallel-console", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system starts no more threads
            os.close(self._read)
            self.given()
            raise

    def given(self) -> None:
        """Let go of this process's own end, once the process has its own."""
        os.close(self.descriptor)

    def last_lines(self, seconds: float) -> list[str]:
        """What the processes said last, of other lines than this pack's own; waits `seconds` for their ends at most."""
        self._thread.join(seconds)
        return list(self._lines)

    def _pass_on(self) -> None:
        begun = b""
        with os.fdopen(self._read, "rb", buffering=0) as source:
            while data := source.read(2**16):
                *whole, begun = (begun + data).split(b"\n")
                begun = begun[-_LENGTH:]
                self._keep(whole)
                with contextlib.suppress(OSError):  # there may be no console
                    while data:
                        data = data[os.write(2, data) :]
        self._keep([begun])

    def _keep(self, lines: list[bytes]) -> None:
        texts = (line.decode(errors="replace").strip()[:_LENGTH] for line in lines)
        self._lines.extend(text for text in texts if text and not text.startswith(_OURS))
