"""Messages between the coordinator and processes that it started itself: length, then a pickle.

A pickle can run code, so nothing but our own processes, on sockets that have no name, may be read with this. Files and
the network never are.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any

__all__ = ["Frames", "receive", "send"]

_LENGTH = struct.Struct("<Q")


def packed(message: Any) -> bytes:
    """One message as bytes."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def send(channel: socket.socket, message: Any) -> None:
    """Send one message, waiting for room."""
    channel.sendall(packed(message))


def receive(channel: socket.socket) -> Any:
    """Wait for one message. Raises EOFError where the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    return pickle.loads(_exactly(channel, length))  # noqa: S301  our own processes, see above


def _exactly(channel: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = channel.recv(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class Frames:
    """One end of a channel that never waits: bytes to send pile up, bytes that came make messages when whole."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self.channel = channel
        self._out = bytearray()
        self._in = bytearray()

    @property
    def waiting(self) -> bool:
        """There is something left to send."""
        return bool(self._out)

    def put(self, message: Any) -> None:
        """Send as much as there is room for, keep the rest."""
        self._out += packed(message)
        self.flush()

    def flush(self) -> None:
        """Send what is left, as much as there is room for. An end that is gone shows when reading."""
        try:
            while self._out:
                del self._out[: self.channel.send(self._out)]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()

    def messages(self) -> Iterator[Any]:
        """Those that are whole. Raises EOFError, after them, where the other end is gone."""
        gone = False
        try:
            while part := self.channel.recv(1 << 20):
                self._in += part
            gone = True
        except BlockingIOError:
            pass
        except OSError:
            gone = True
        while len(self._in) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._in)[0]
            if len(self._in) < end:
                break
            body = bytes(self._in[_LENGTH.size : end])
            del self._in[:end]
            yield pickle.loads(body)  # noqa: S301  our own processes, see above
        if gone:
            raise EOFError
