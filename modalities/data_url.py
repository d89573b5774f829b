"""What a data URL or base64 holds, decoded in pieces.

Each call that decodes holds the lock of the interpreter: over megabytes at a time, no other thread
would get its turn meanwhile. And a text of `%41` would be cut into a million objects.
"""

from __future__ import annotations

import time
from binascii import a2b_base64
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_to_bytes

_PIECE = 1 << 15
_SHORT = 1 << 19  # bytes that are decoded without a pause
_PAUSE_S = 50e-6
_ESCAPE = 3  # characters of %41


def decoded(url: str) -> bytes:
    """The content of a data URL.

    Raises:
        ValueError: it is malformed.

    >>> decoded("data:,a%20b"), decoded("data:;base64,aGk=")
    (b'a b', b'hi')
    """
    comma = url.find(",")
    if comma < 0:
        raise ValueError("a data URL needs a comma before its content")
    body = _unquoted(url, comma + 1)
    in_base64 = url[:comma].lower().replace(" ", "").endswith(";base64")
    return from_base64(body) if in_base64 else b"".join(body)


def from_base64(pieces: Iterable[bytes]) -> bytes:
    """Decoded base64, white space aside.

    Raises:
        ValueError: it is none.
    """
    made = bytearray()
    rest, ended = b"", False
    for piece in pieces:
        found = rest + b"".join(piece.split())
        whole = len(found) // 4 * 4
        if ended and found:
            raise ValueError("there is more behind its end")
        made += a2b_base64(found[:whole], strict_mode=True)
        ended = found[:whole].endswith(b"=")
        rest = found[whole:]
        if len(made) > _SHORT:
            # Who waits for the lock gets it at once, not when its turn is over: the model's thread
            # needs it after every operation.
            time.sleep(_PAUSE_S)
    if rest:
        raise ValueError("its end is missing")
    return bytes(made)


def pieces(text: str) -> Iterator[bytes]:
    """A text of ASCII in pieces. Raises UnicodeEncodeError: it is none."""
    return (text[at : at + _PIECE].encode("ascii") for at in range(0, len(text), _PIECE))


def _unquoted(url: str, at: int) -> Iterator[bytes]:
    while at < len(url):
        end = at + _PIECE
        if end < len(url) and (cut := url.rfind("%", end - _ESCAPE + 1, end)) >= 0:
            end = cut  # not within an escape
        yield unquote_to_bytes(url[at:end])
        at = end
