"""What of a message's head is passed on, and what ends at a proxy."""

from __future__ import annotations

import re
from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

# RFC 9110, 7.6.1, and those before it.
_OF_A_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate",
     b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)  # fmt: skip
# Ours or made anew: a replica has another name, the body is whole, ids are the gate's. Whose word a
# replica on this machine would take for a client's address, is not the client's to say.
_OURS = frozenset(
    {b"host", b"content-length", b"expect", b"x-request-id", b"forwarded", b"x-forwarded-for",
     b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port", b"x-real-ip"}
)  # fmt: skip
_REPLICAS = frozenset({b"date", b"server", b"x-request-id", b"x-kvshare-replica"})
_PATH = re.compile(r"/v1(/[A-Za-z0-9._~@:+-]+)+")
_OTHERS = frozenset({"/tokenize", "/detokenize", "/version"})
# Each would reach one replica of many, with effects that all should have.
_REFUSED = re.compile(r"/v1/(cache|load_lora_adapter|unload_lora_adapter)(/.*)?")


def is_passed_on(path: str) -> bool:
    """Whether a path is one of the API's, and spelt in the one way that there is."""
    if _REFUSED.fullmatch(path):
        return False
    dots = {".", ".."} & set(path.split("/"))
    return path in _OTHERS or (_PATH.fullmatch(path) is not None and not dots)


def to_replica(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> Headers:
    """The client's headers as a replica gets them; names in small letters.

    Keys, content types and all that is not the connection's go unchanged, in their order.
    """
    kept = _without(headers, _OURS)
    return [*kept, (b"x-request-id", request_id.encode("ascii"))]


def to_client(headers: Iterable[tuple[bytes, bytes]], replica: int) -> Headers:
    """A replica's headers as the client gets them."""
    kept = _without(headers, _REPLICAS)
    return [*kept, (b"x-kvshare-replica", str(replica).encode())]


def _without(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Headers:
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in lower
        if name == b"connection"
        for token in value.split(b",")
    }
    return [(n, v) for n, v in lower if n not in _OF_A_HOP and n not in dropped and n not in named]
