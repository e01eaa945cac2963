"""Sends messages to a process that may have stopped reading, without waiting for it. Imports no torch."""

from __future__ import annotations

import queue
import threading
from multiprocessing.connection import Connection


class Outbox:
    """Messages on their way to another process, in their order; a thread writes them.

    A pipe holds some 200 kB. The message that no longer fits would keep the sender waiting for a process that reads
    nothing, and who waits shows no sign of life itself.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Send a message. Whether the other process lives is not looked at: who receives from it will see its end."""
        self._messages.put(message)

    def close(self, seconds: float) -> bool:
        """Send what has been given, and nothing more; whether that was done after `seconds`."""
        self._messages.put(None)
        if self._thread is not threading.current_thread():  # a collector of garbage may have come here from anywhere
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _write(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._connection.send_bytes(message)
        except OSError:  # closed, at this end or the other
            return
