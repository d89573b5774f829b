"""By which names this server may be asked, and for pages of which origins.

A page whose name was made to resolve to this machine (DNS rebinding) is, to a browser, of one
origin with this server, and may read its answers. Its name in `Host` gives it away.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.errors import ConfigError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_UNSPECIFIED = frozenset({"0.0.0.0", "::"})  # what listens on all addresses
_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+))(?::\d*)?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


class HostCheck:
    """Which values of `Host` are answered.

    Args:
        allowed: names and addresses; ``*.example.com`` for all names below; ``*`` for all.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        names = [_canonical(name) for name in allowed]
        self._any = "*" in names
        self._any_address = not _UNSPECIFIED.isdisjoint(names)
        self._names = frozenset(names)
        self._below = tuple(name[1:] for name in names if name.startswith("*."))

    def error(self, host: str | None) -> ApiError | None:
        """Why a request is not answered. One without `Host` is of no browser."""
        if self._any or host is None:
            return None
        found = _HOST.fullmatch(host)
        if found is None:
            return ApiError(400, "the header Host is malformed")
        name = _canonical(found[1] or found[2])
        if name in self._names or name.endswith(self._below):
            return None
        # Who asks by an address was not led here by a name.
        if self._any_address and _address(name) is not None:
            return None
        return ApiError(
            421,
            f"this server does not answer to the name {name[:100]!r}; if it should, start it with"
            " --allowed-host",
            code="unknown_host",
        )


def allowed_hosts(given: Sequence[str], bound: str, with_keys: bool) -> tuple[str, ...]:
    """What a server may be called.

    Args:
        given: by the operator: names, addresses or ``*``.
        bound: what it listens on; ``0.0.0.0`` and ``::`` stand for all addresses.
        with_keys: whether it asks for API keys. A page that got here by a trick has none, so
            without `given` all names are fine.

    Raises:
        ConfigError: what was given is neither a name nor an address.
    """
    for name in given:
        bare = name.removeprefix("[").removesuffix("]")
        if name != "*" and _address(bare) is None and not _NAME.fullmatch(name):
            raise ConfigError(
                f"--allowed-host {name}: neither a name (shop.example, *.shop.example) nor an"
                " address nor *; without scheme and port"
            )
    if with_keys and not given:
        return ("*",)
    return (*_LOOPBACK, bound, *given)


def cors_origins(given: Sequence[str]) -> tuple[str, ...]:
    """Origins of pages that may read answers. Raises ConfigError: one is malformed."""
    for origin in given:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-origin {origin}: an origin is like https://shop.example or"
                " http://localhost:3000, without a path, in small letters; or *"
            )
    return tuple(given)


def _canonical(name: str) -> str:
    bare = name.lower().removeprefix("[").removesuffix("]").removesuffix(".")
    address = _address(bare)
    return bare if address is None else str(address)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
