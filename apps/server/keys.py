"""API keys: made here once, kept as hashes in a file, each bound to a tenant.

A key is 32 random bytes, so a plain SHA-256 of it cannot be searched: the slow hashes that
passwords need would only slow down every request.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from kvshare_mm.errors import ConfigError

logger = logging.getLogger(__name__)

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]+")
_HASH = re.compile(r"[0-9a-f]{64}")
_UNREAD = ()  # of no file


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key; None: there is no limit.

    Attributes:
        requests_per_minute: requests to all routes that need a key.
        prompt_tokens_per_minute, output_tokens_per_minute: of chats and completions.
        concurrent_requests: requests that are being answered.

    Raises:
        ValueError: one is no whole number of at least 1.
    """

    requests_per_minute: int | None = None
    prompt_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        tenant: whose key it was; "" where no keys are asked for.
        admin: whether the cache may be administrated.
        key: hash of the key; "" where none is asked for.
        limits: of the key; None: it has none.
    """

    tenant: str = ""
    admin: bool = False
    key: str = ""
    limits: Limits | None = None


def digest(key: str) -> str:
    """What is kept of a key: 64 hex digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def add_key(path: Path, tenant: str, admin: bool = False, limits: Limits | None = None) -> str:
    """Make a key, append its hash to the file and return the key itself, which is kept nowhere.

    Raises:
        ConfigError: the tenant's name or the file cannot be used.
    """
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(f"{tenant!r} is no name for a tenant: letters, digits, '.', '_' and '-'")
    if path.exists():
        _read(path)  # nothing is appended to a file of another kind
    key = f"kvs-{secrets.token_urlsafe(32)}"
    entry = {"tenant": tenant, "admin": admin, "sha256": digest(key)}
    if limits is not None:
        entry["limits"] = {name: n for name, n in asdict(limits).items() if n is not None}
    line = json.dumps(entry)
    try:
        torn = path.exists() and path.read_bytes()[-1:] not in {b"", b"\n"}
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write("\n" * torn + line + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return key


class KeyRing:
    """The keys of a file. A file that changes is read again, so a deleted line ends a key.

    While it cannot be read, or has a bad line, the keys that it had before are in force: a slip of
    one tenant's line must not lock out all others.

    Args:
        path: JSON Lines: ``{"tenant": "shop", "admin": false, "sha256": "...", "limits": {...}}``,
            the last as in `Limits` or left out; None: no file.
        admin_key: a further key that may administrate, or None.
        api_key: the one key of a server without a file, or None.

    Attributes:
        problem: why the file as it is now is not in force, or None.

    Raises:
        ConfigError: the file cannot be read or has a bad line; the one key cannot be sent.
    """

    def __init__(
        self, path: Path | None, admin_key: str | None = None, api_key: str | None = None
    ) -> None:
        self._path = path
        if api_key is not None and not _KEY.fullmatch(api_key):
            raise ConfigError("the API key must be letters, digits and signs of ASCII, no spaces")
        self._single = None if api_key is None else digest(api_key)
        self._admin = None if admin_key is None else digest(admin_key)
        self.problem: str | None = None
        self._stamp = _stamp(path)
        self._callers = {} if path is None else _read(path)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._path is not None or self._single is not None

    def caller(self, key: str | None) -> Caller | None:
        """Whose key this is; None: nobody's.

        Looking a hash up tells by its time at most about the hash, from which no key follows.
        """
        if key is None:
            return None if self.required else Caller()
        known = digest(key)
        if known == self._admin:
            return Caller(admin=True, key=known)
        if known == self._single:
            return Caller("default", key=known)
        if self._path is None:
            # Clients often send some key where none is asked for.
            return None if self.required else Caller()
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._callers, self.problem = _read(self._path), None
            except ConfigError as error:
                unread = isinstance(error.__cause__, OSError)
                if not unread or str(error) != self.problem:
                    logger.error("the last good keys stay in force: %s", error)
                if unread:
                    self._stamp = _UNREAD  # it may be readable again without having changed
                self.problem = str(error)
        return self._callers.get(known)


def _stamp(path: Path | None) -> tuple[int, ...] | None:
    """What differs once a file does: times of changes can be set back, but for the second one."""
    try:
        status = None if path is None else path.stat()
    except OSError:
        return None
    if status is None:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size


def _read(path: Path) -> dict[str, Caller]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the keys in {path}: {error}") from error
    callers: dict[str, Caller] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            entry = json.loads(line)
            tenant, admin, known = entry["tenant"], entry.get("admin", False), entry["sha256"]
            if not _TENANT.fullmatch(tenant) or not _HASH.fullmatch(known):
                raise ValueError("tenant or sha256 is malformed")
            if not isinstance(admin, bool):
                raise ValueError("admin is true or false")
            limits = Limits(**entry["limits"]) if "limits" in entry else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is no key: {error}") from error
        callers[known] = Caller(tenant, admin, known, limits)
    return callers
