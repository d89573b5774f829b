"""The admin key of a server without a key file: made at the start, read by `kvshare cache`.

It lies where only its user can read it, as Jupyter's tokens do. Without it any page in the user's
browser could clear the cache of a server on localhost.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

import platformdirs


def key_file(port: int) -> Path:
    """Where the key of the server on this port is kept."""
    return Path(platformdirs.user_state_dir("kvshare", appauthor=False)) / f"admin-{port}.key"


def write(port: int) -> str:
    """Make a key for the server on this port and keep it for the user's own commands."""
    key = f"kvs-admin-{secrets.token_urlsafe(32)}"
    file = key_file(port)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as target:
        target.write(key)
    return key


def read(port: int) -> str | None:
    """The key of the server on this port, if it was started by this user."""
    with suppress(OSError):
        return key_file(port).read_text(encoding="utf-8").strip()
    return None


def remove(port: int, key: str) -> None:
    """Forget a key, unless another server on the same port has written its own."""
    if read(port) == key:
        key_file(port).unlink(missing_ok=True)
