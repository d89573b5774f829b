"""Hashes that say when two pictures or two clips are the same to a model."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

T = TypeVar("T")


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """xxh3 of every row: ``[n, ...]`` contiguous, any dtype -> ``[n]`` uint64."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    return np.array([xxhash.xxh3_64_intdigest(row) for row in flat], dtype=np.uint64)


def content_digest(hashes: np.ndarray, *facts: Any) -> str:
    """128 bits, 32 hex digits, over a medium's parts and all that decides what becomes of them."""
    digest = xxhash.xxh3_128(json.dumps(facts).encode())
    digest.update(hashes.tobytes())
    return digest.hexdigest()


def settings_digest(processor: Any) -> str:
    """Names all settings of a processor of transformers: other settings, other inputs."""
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(settings.encode())


class Seen(Generic[T]):
    """What files turned out to hold, so that one that comes again need not be decoded to be known.

    Each tenant has its own: how long an answer takes must not tell what another one sent.

    Args:
        capacity: files remembered; the least recently seen is forgotten.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._known: OrderedDict[str, T] = OrderedDict()

    def get(self, content: bytes, tenant: str) -> T | None:
        key = _key(content, tenant)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, content: bytes, tenant: str, value: T) -> None:
        key = _key(content, tenant)
        with self._lock:
            self._known[key] = value
            self._known.move_to_end(key)
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)


def _key(content: bytes, tenant: str) -> str:
    digest = xxhash.xxh3_128(tenant.encode("utf-8", "surrogatepass") + b"\0")
    digest.update(content)
    return digest.hexdigest()
