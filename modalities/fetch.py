"""Fetches pictures and sound that a request names by URL, without letting it reach inside.

Whoever may send a URL to a server can make it connect: to its own admin pages, to the metadata
service of a cloud, to a host that never stops sending. So an address is judged when the connection
is opened, after the name was resolved and once more on every redirect, and the connection goes to
the very address that was judged: a name that resolves differently the next time gains nothing.
Environment variables for proxies are not followed: the proxy would do what was refused here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
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
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

import httpcore2

from kvshare_mm.errors import InvalidRequestError

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
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
        allow_private: also connect to addresses that are not public. For tests and closed networks.
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
        if not isinstance(url, str):
            raise InvalidRequestError(f"a URL is text, not a {type(url).__name__}")
        # Before anything splits it: a data URL may have megabytes.
        scheme = url[:8].partition(":")[0].strip().lower()
        if scheme not in self.policy.schemes:
            allowed = ", ".join(sorted(self.policy.schemes))
            raise InvalidRequestError(
                f"URLs of this kind are not fetched: {_short(url)}; allowed are {allowed}"
            )
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

    # -- http and https ---------------------------------------------------------------------

    async def _http(self, url: str) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            parts, host = self._judged(url)
            moved, content = await self._get(parts, host, url)
            if moved is None:
                return content
            url = urljoin(url, moved)
            scheme = urlsplit(url).scheme.lower()
            if scheme not in {"http", "https"} or scheme not in self.policy.schemes:
                raise InvalidRequestError(f"a redirect to {_short(url)} is not followed")
        raise InvalidRequestError(
            f"{_short(url)}: more than {self.policy.max_redirects} redirects are not followed"
        )

    def _judged(self, url: str) -> tuple[SplitResult, str]:
        """A URL taken apart, and its host as it is asked for; what can be refused is refused."""
        try:
            parts = urlsplit(url)
            _ = parts.port  # raises if it is no port
            host = (parts.hostname or "").rstrip(".")
            if ":" not in host and not host.isascii():
                host = host.encode("idna").decode()
        except ValueError as error:
            raise InvalidRequestError(f"{_short(url)} is no valid URL: {error}") from error
        if not host or not (_is_address(host) or _HOST.fullmatch(host)):
            raise InvalidRequestError(f"{_short(url)} has no valid host")
        if "@" in parts.netloc:
            raise InvalidRequestError("URLs with a user name or password are not fetched")
        domains = self.policy.domains
        if domains is not None and not any(host == d or host.endswith(f".{d}") for d in domains):
            raise InvalidRequestError(f"media are not fetched from {host}: it is not allowed")
        return parts, host

    async def _get(self, parts: SplitResult, host: str, url: str) -> tuple[str | None, bytes]:
        """Where a URL redirects to, or None and its content."""
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
        address = httpcore2.URL(
            scheme=parts.scheme.lower(), host=host, port=parts.port, target=target
        )
        step = dict.fromkeys(("connect", "read", "write", "pool"), self.policy.timeout_s)
        headers: dict[bytes | str, bytes | str] = {
            "host": parts.netloc.lower() if _is_address(host) else _authority(host, parts.port),
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
        # Four characters a three bytes, or three a byte: too much is known before it is decoded.
        if len(url) > 3 * self.policy.max_bytes + 256:
            raise self._too_large(url)
        head, comma, body = url.partition(",")
        if not comma:
            raise InvalidRequestError("a data URL needs a comma before its content")
        content = unquote_to_bytes(body)
        if head.lower().replace(" ", "").endswith(";base64"):
            try:
                content = base64.b64decode(b"".join(content.split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise InvalidRequestError(f"a data URL is no base64: {error}") from error
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
            raise httpcore2.ConnectError(f"there is no host {host}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # One private address among public ones is one too many: which is used would be luck.
        if not self._policy.allow_private and not all(map(_is_public, addresses)):
            raise InvalidRequestError(
                f"{host} has an address that is not public; media are not fetched from there"
            )
        failure: Exception = httpcore2.ConnectError(f"there is no host {host}")
        for address in addresses:
            try:
                return await super().connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except httpcore2.ConnectError as error:
                failure = error
        raise failure


def _is_public(address: str) -> bool:
    """Whether an address is one of the public Internet, also the one packed into another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        packed = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            packed.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if int(ip) >> 32 == 0:  # the old ::a.b.c.d
            return False
        if any(inner is not None and not _is_public(str(inner)) for inner in packed):
            return False
        if any(inner is not None for inner in packed):
            return True
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _authority(host: str, port: int | None) -> str:
    return host if port is None else f"{host}:{port}"


def _short(url: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in url[:_SHOWN])
    return text if len(url) <= _SHOWN else f"{text}..."
