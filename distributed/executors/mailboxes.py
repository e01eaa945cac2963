"""Messages to and from a process that may stop in the middle of one, without waiting for it. Imports no torch."""

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
        return _has_ended(self._thread, seconds)

    def _write(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._connection.send_bytes(message)
        except OSError:  # closed, at this end or the other
            return


class Inbox:
    """Messages of another process, in their order; a thread reads them, which alone waits for the rest of a message."""

    def __init__(self, connection: Connection):
        self._connection, self._ended = connection, False
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="inbox", daemon=True)
        self._thread.start()

    def receive(self, seconds: float) -> bytes | None:
        """The next message; None where none was whole in time.

        Raises:
            EOFError: the other process has ended, and its last message was received.
        """
        try:
            message = None if self._ended else self._messages.get(timeout=seconds)
        except queue.Empty:
            return None
        if message is None:
            self._ended = True
            raise EOFError
        return message

    def close(self, seconds: float) -> bool:
        """Wait until nothing is read any more from a line that has been shut down; whether that was so in time."""
        return _has_ended(self._thread, seconds)

    def _read(self) -> None:
        try:
            while True:
                self._messages.put(self._connection.recv_bytes())
        except (EOFError, OSError):  # closed, at this end or the other
            self._messages.put(None)


def _has_ended(thread: threading.Thread, seconds: float) -> bool:
    if thread is not threading.current_thread():  # a collector of garbage may have come here from anywhere
        thread.join(seconds)
    return not thread.is_alive()
