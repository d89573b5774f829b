"""Messages over a socket: their length in eight bytes, then their bytes."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("!Q")


def send(other: socket.socket, message: bytes) -> None:
    """Send a message; raises OSError."""
    other.sendall(_LENGTH.pack(len(message)))
    other.sendall(message)


def receive(other: socket.socket, most: int = 1 << 31) -> bytearray:
    """The next message.

    Args:
        most: bytes it may have.

    Raises:
        EOFError: there is none any more.
        OSError: it cannot be read, or is too long.
    """
    (size,) = _LENGTH.unpack(_exactly(other, _LENGTH.size))
    if size > most:
        raise OSError(f"a message of {size} bytes; at most {most} were expected")
    return _exactly(other, size)


def _exactly(other: socket.socket, size: int) -> bytearray:
    message = bytearray(size)
    view = memoryview(message)
    while view:
        read = other.recv_into(view)
        if read == 0:
            raise EOFError
        view = view[read:]
    return message
