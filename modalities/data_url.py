"""What a data URL or base64 holds, decoded in pieces.

Each call that decodes holds the lock of the interpreter: over megabytes at a time, no other thread
would get its turn meanwhile. And a text of `%41` would be cut into a million objects.
"""

from __future__ import annotations

import time
from binascii import a2b_base64
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_to_bytes

from kvshare_mm.errors import InvalidRequestError

_PIECE = 1 << 15
_SHORT = 1 << 19  # bytes that are decoded without a pause
_PAUSE_S = 50e-6
_ESCAPE = 3  # characters of %41
MAX_FRAMES = 768  # of a video, Qwen's own most
_FRAMES = "data:video/jpeg;base64"


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


def frames(url: str, max_bytes: int, where: str) -> list[bytes]:
    """The pictures of a video in a data URL, as vLLM takes them: base64, with commas between.

    Args:
        max_bytes: so many bytes may be in all of them.
        where: its field, for errors.

    Raises:
        InvalidRequestError: it is no such URL, malformed, or there is more; or more than
            `MAX_FRAMES`.

    >>> frames("data:video/jpeg;base64,aGk=,aG8=", 100, "url")
    [b'hi', b'ho']
    """

    def bad(why: str, at: str = "") -> InvalidRequestError:
        return InvalidRequestError(f"{where}{at}{why}", where + at)

    comma = url.find(",", 0, 1000)
    if url[: max(0, comma)].lower().replace(" ", "") != _FRAMES:
        raise bad(f": video files are not read; send frames, as {_FRAMES},<frame>,<frame>")
    # Four characters for three bytes: what is too large is known before it is decoded.
    if len(url) - comma > max_bytes // 3 * 4 + 5 * MAX_FRAMES:
        raise bad(f" has more than {max_bytes} bytes, the most that is taken")
    found = url[comma + 1 :].split(",", MAX_FRAMES)
    if len(found) > MAX_FRAMES:
        raise bad(f" has more than {MAX_FRAMES} frames, the most that are taken")
    made = []
    for i, frame in enumerate(found):
        try:
            made.append(from_base64(pieces(frame)))
        except ValueError as error:
            raise bad(f" is no base64: {error}", f"[{i}]") from error
    return made


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
