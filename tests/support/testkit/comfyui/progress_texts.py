"""The texts that ComfyUI shows under running nodes, as a browser receives them over its web socket."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct
import threading

_TEXT_EVENT = 3  # ComfyUI's BinaryEventTypes.TEXT


class ProgressTexts:
    """Listens to a server until `close`. `texts` holds what has arrived: the node's id and its text."""

    def __init__(self, port: int):
        self.texts: list[tuple[str, str]] = []
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            *("GET /ws?clientId=texts HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket"),
            *("Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""),
        ]
        self._socket.sendall("\r\n".join(lines).encode())
        self._stream = self._socket.makefile("rb")
        assert b"101" in self._stream.readline()
        while self._stream.readline().strip():
            pass
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Stop to listen."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, struct.error, ValueError):
            while True:
                kind, data = self._frame()
                if kind == 2 and struct.unpack(">I", data[:4])[0] == _TEXT_EVENT:
                    length = struct.unpack(">I", data[4:8])[0]
                    self.texts.append((data[8 : 8 + length].decode(), data[8 + length :].decode()))

    def _frame(self) -> tuple[int, bytes]:
        """One frame of a server, which masks nothing: its kind (2 is binary) and its data."""
        first, length = struct.unpack(">BB", self._stream.read(2))
        if length == 126:
            length = struct.unpack(">H", self._stream.read(2))[0]
        elif length == 127:
            length = struct.unpack(">Q", self._stream.read(8))[0]
        return first & 0x0F, self._stream.read(length)
