"""Hashes that say when two pictures or two clips are the same to a model."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from cachetools import LRUCache

T = TypeVar("T")

# 256 bits: who sends media chooses what is hashed, and must not find two of one name.
DIGEST_SIZE = 32
_blake2b = partial(hashlib.blake2b, digest_size=DIGEST_SIZE)


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """Hash of every row: ``[n, ...]``, any dtype -> ``[n, 32]`` uint8."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    hashes = b"".join(_blake2b(row).digest() for row in flat)
    return np.frombuffer(hashes, dtype=np.uint8).reshape(len(rows), DIGEST_SIZE)


def content_digest(hashes: np.ndarray, *facts: Any) -> str:
    """64 hex digits over a medium's parts and all that decides what becomes of them."""
    return _blake2b(json.dumps(facts).encode() + hashes.tobytes()).hexdigest()


def settings_digest(processor: Any) -> str:
    """Names all settings of a processor of transformers: other settings, other inputs."""
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return _blake2b(settings.encode()).hexdigest()


class Seen(Generic[T]):
    """What files turned out to hold, so that one that comes again need not be decoded to be known.

    Each tenant has its own: how long an answer takes must not tell what another one sent. Files
    are known by a hash under a secret of this process, so nobody can prepare one that passes for
    another.

    Args:
        capacity: files remembered; the least recently seen is forgotten.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(DIGEST_SIZE)
        self._known: LRUCache[bytes, T] = LRUCache(capacity)

    def get(self, content: bytes, tenant: str) -> T | None:
        key = self._key(content, tenant)
        with self._lock:
            found: T | None = self._known.get(key)
            return found

    def put(self, content: bytes, tenant: str, value: T) -> None:
        key = self._key(content, tenant)
        with self._lock:
            self._known[key] = value

    def _key(self, content: bytes, tenant: str) -> bytes:
        # The tenant goes into the key of the hash: before the content, some tenant's name and the
        # begin of a file could be another tenant's name.
        name = tenant.encode("utf-8", "surrogatepass")
        own = _blake2b(name, key=self._secret).digest()
        return _blake2b(content, key=own).digest()
