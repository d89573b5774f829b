"""Fetches pictures and sound that a request names by URL, without letting it reach inside.

Whoever may send a URL to a server can make it connect: to its own admin pages, to the metadata
service of a cloud, to a host that never stops sending. So an address is judged when the connection
is opened, after the name was resolved and once more on every redirect, and the connection goes to
the very address that was judged: a name that resolves differently the next time gains nothing.
Environment variables for proxies are not followed: the proxy would do what was refused here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpcore2

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities import data_url
from kvshare_mm.modalities.addresses import is_cloud, is_cloud_name, is_public, is_public_name

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LONGEST_URL = 8192
_LONGEST_NAME = 253
# What parsers read differently: they drop it, stop at it, or turn it into a slash.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|^\s|\s$")
_AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:%]+))(?::(?P<port>[0-9]{0,5}))?"
)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# Resolvers take such a name for an address: 127.1, 0x7f.1, 2130706433.
_NUMBER_LAST = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched.

    Attributes:
        schemes: of "https", "http", "data" and "file".
        domains: hosts that may be asked, their subdomains included; None: any public host.
        file_roots: folders whose files ``file://`` may name; none: no file may be read.
        max_bytes: largest medium.
        timeout_s: seconds for one medium, from resolving the name to the last byte, redirects
            included.
        max_redirects: redirects followed.
        allow_private: also connect to addresses that are not public, a cloud's own services aside.
            For tests and closed networks.
    """

    schemes: frozenset[str] = frozenset({"https", "http", "data", "file"})
    domains: frozenset[str] | None = None
    file_roots: tuple[Path, ...] = ()
    max_bytes: int = 20 << 20
    timeout_s: float = 10.0
    max_redirects: int = 3
    allow_private: bool = False

    def __post_init__(self) -> None:
        if unknown := self.schemes - {"https", "http", "data", "file"}:
            raise ValueError(f"no such schemes: {', '.join(sorted(unknown))}")
        if self.max_bytes < 1 or self.timeout_s <= 0 or self.max_redirects < 0:
            raise ValueError("max_bytes and timeout_s are positive, max_redirects is not negative")
        if self.domains is not None:
            domains = frozenset(d.lower().strip().strip(".") for d in self.domains)
            object.__setattr__(self, "domains", domains)


class MediaFetcher:
    """Fetches media within a policy.

    >>> MediaFetcher().fetch("data:,hello")
    b'hello'
    """

    def __init__(self, policy: FetchPolicy | None = None) -> None:
        self.policy = FetchPolicy() if policy is None else policy

    def fetch(self, url: str) -> bytes:
        """The content of a URL; `afetch` for callers without an event loop.

        Raises:
            InvalidRequestError: it may not be fetched, is too large, or could not be read.
        """
        if self._scheme(url) == "data":
            return self._data(url)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.afetch(url))
        with ThreadPoolExecutor(1) as pool:  # a loop runs here: another one needs another thread
            return pool.submit(asyncio.run, self.afetch(url)).result()

    async def afetch(self, url: str) -> bytes:
        """The content of a URL.

        Raises:
            InvalidRequestError: it may not be fetched, is too large, or could not be read.
        """
        scheme = self._scheme(url)
        if scheme == "data":
            return self._data(url)
        if scheme == "file":
            return await asyncio.to_thread(self._file, url)
        try:
            async with asyncio.timeout(self.policy.timeout_s):
                return await self._http(url)
        except TimeoutError as error:
            raise InvalidRequestError(
                f"{_short(url)} took longer than {self.policy.timeout_s:g} s"
            ) from error

    def _scheme(self, url: str) -> str:
        """The scheme of a URL, if it is allowed."""
        if not isinstance(url, str):
            raise InvalidRequestError(f"a URL is text, not a {type(url).__name__}")
        # Before anything splits it: a data URL may have megabytes.
        scheme = url[:8].partition(":")[0].strip().lower()
        if scheme not in self.policy.schemes:
            allowed = ", ".join(sorted(self.policy.schemes))
            raise InvalidRequestError(
                f"URLs of this kind are not fetched: {_short(url)}; allowed are {allowed}"
            )
        return scheme

    # -- http and https ---------------------------------------------------------------------

    async def _http(self, url: str) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            moved, content = await self._get(self._judged(url), url)
            if moved is None:
                return content
            url = self._moved(url, moved)
        raise InvalidRequestError(
            f"{_short(url)}: more than {self.policy.max_redirects} redirects are not followed"
        )

    def _moved(self, url: str, location: str) -> str:
        """Where a redirect leads."""
        try:
            if _AMBIGUOUS.search(location):
                raise ValueError(location)
            target = urljoin(url, location)
            scheme = urlsplit(target).scheme
        except ValueError as error:
            raise InvalidRequestError(f"{_short(url)} redirects to no valid URL") from error
        if scheme not in {"http", "https"} or scheme not in self.policy.schemes:
            raise InvalidRequestError(f"a redirect to {_short(target)} is not followed")
        return target

    def _judged(self, url: str) -> _Target:
        """What a URL asks for, and of whom; what can be refused without asking is refused."""
        if len(url) > _LONGEST_URL or _AMBIGUOUS.search(url):
            raise InvalidRequestError(
                f"{_short(url)} is no valid URL: it has up to {_LONGEST_URL} characters, and none "
                "that a URL spells with %"
            )
        try:
            target = _target(url)
        except ValueError as error:
            raise InvalidRequestError(f"{_short(url)} is no valid URL: {error}") from error
        host, domains = target.host, self.policy.domains
        if domains is not None and not any(host == d or host.endswith(f".{d}") for d in domains):
            raise InvalidRequestError(f"media are not fetched from {host}: it is not allowed")
        if not _is_address(host):
            good = not is_cloud_name(host) if self.policy.allow_private else is_public_name(host)
            if not good:
                raise _not_public(host)
        return target

    async def _get(self, target: _Target, url: str) -> tuple[str | None, bytes]:
        """Where a URL redirects to, or None and its content."""
        address = httpcore2.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        step = dict.fromkeys(("connect", "read", "write", "pool"), self.policy.timeout_s)
        headers: dict[bytes | str, bytes | str] = {
            "host": target.authority,
            "accept": "*/*",
            "accept-encoding": "identity",  # nothing to unpack is no bomb
            "user-agent": "kvshare-mm",
        }
        backend = _JudgingBackend(self.policy)
        try:
            async with (
                httpcore2.AsyncConnectionPool(network_backend=backend) as pool,
                pool.stream("GET", address, headers=headers, extensions={"timeout": step}) as got,
            ):
                sent = {k.decode().lower(): v.decode("latin-1") for k, v in got.headers}
                if got.status in _REDIRECTS and "location" in sent:
                    return sent["location"], b""
                if got.status != 200:
                    raise InvalidRequestError(f"{_short(url)} answered with status {got.status}")
                if sent.get("content-encoding", "identity").lower() != "identity":
                    raise InvalidRequestError(f"{_short(url)} sends packed content unasked")
                length = sent.get("content-length", "0")
                if length.isdecimal() and int(length) > self.policy.max_bytes:
                    raise self._too_large(url)
                content = bytearray()
                async for chunk in got.aiter_stream():
                    content += chunk
                    if len(content) > self.policy.max_bytes:
                        raise self._too_large(url)
                return None, bytes(content)
        except httpcore2.TimeoutException as error:
            raise TimeoutError from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            raise InvalidRequestError(
                f"{_short(url)} could not be fetched: {str(error) or type(error).__name__}"
            ) from error

    # -- what needs no network --------------------------------------------------------------

    def _data(self, url: str) -> bytes:
        # Four characters for three bytes, or three for one: what is too large is known undecoded.
        if len(url) > 3 * self.policy.max_bytes + 256:
            raise self._too_large(url)
        try:
            content = data_url.decoded(url)
        except ValueError as error:  # no base64, or half a surrogate pair
            raise InvalidRequestError(f"a data URL cannot be decoded: {error}") from error
        if len(content) > self.policy.max_bytes:
            raise self._too_large(url)
        return content

    def _file(self, url: str) -> bytes:
        refused = InvalidRequestError(
            f"{_short(url)} is not a file in a folder that may be read; send the content instead"
        )
        try:
            parts = urlsplit(url)
            if parts.netloc not in {"", "localhost"}:
                raise refused
            # Links are followed first: what counts is where the file is.
            path = Path(os.fsdecode(unquote_to_bytes(parts.path))).resolve(strict=True)
            roots = [root.resolve() for root in self.policy.file_roots]
            if not any(path.is_relative_to(root) for root in roots):
                raise refused
            # A pipe would block, and a link put there meanwhile would lead elsewhere.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise refused
                content = file.read(self.policy.max_bytes + 1)
        except (OSError, ValueError) as error:
            if error is refused:
                raise
            # The same words whether it exists or not: nothing is to be learnt about this machine.
            raise refused from error
        if len(content) > self.policy.max_bytes:
            raise self._too_large(url)
        return content

    def _too_large(self, url: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{_short(url)} has more than {self.policy.max_bytes} bytes, the most that is taken"
        )


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL taken apart.

    Attributes:
        scheme: "http" or "https".
        host: an address without brackets, or a name in lower case.
        port: None: the scheme's.
        path: path and query, as they are sent.
    """

    scheme: str
    host: str
    port: int | None
    path: str

    @property
    def authority(self) -> str:
        """For the header ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


def _target(url: str) -> _Target:
    """Raises ValueError: not a URL, or one whose host or port is in doubt."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("user names and passwords are not sent")
    # Not `parts.hostname`: what it makes of brackets differs between versions of Python.
    found = _AUTHORITY.fullmatch(parts.netloc)
    if found is None:
        raise ValueError("it has no valid host")
    port = int(found["port"]) if found["port"] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    if found["v6"] is not None:
        host = str(ipaddress.IPv6Address(found["v6"]))
    else:
        host = _host(found["host"])
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
    return _Target(parts.scheme, host, port, path)


def _host(text: str) -> str:
    """A host as it is asked for. Raises ValueError: there can be no such host."""
    if not text.isascii():
        text = text.encode("idna").decode()
    host = text.lower().removesuffix(".")
    if len(host) > _LONGEST_NAME or not _NAME.fullmatch(host):
        raise ValueError("it has no valid host")
    if _NUMBER_LAST.fullmatch(host) and not _is_address(host):
        raise ValueError("its host is an address of an odd form")
    return host


class _JudgingBackend(httpcore2.AnyIOBackend):
    """Resolves names itself, and connects to addresses that the policy allows."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _not_public(host) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # One private address among public ones is one too many: which is used would be luck.
        if not addresses or not all(map(self._allowed, addresses)):
            raise _not_public(host)
        failure: Exception = httpcore2.ConnectError("nobody answers")
        for address in addresses:
            try:
                return await super().connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except httpcore2.ConnectError as error:
                failure = error
        raise failure

    def _allowed(self, address: str) -> bool:
        return not is_cloud(address) if self._policy.allow_private else is_public(address)


def _not_public(host: str) -> InvalidRequestError:
    # The same words whether there is such a host or not: names of inside are nobody's business.
    return InvalidRequestError(
        f"{_short(host)} has no address, or one that is not public; nothing is fetched from there"
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _short(url: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in url[:_SHOWN])
    return text if len(url) <= _SHOWN else f"{text}..."
