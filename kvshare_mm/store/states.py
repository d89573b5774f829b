"""States of recurrent layers in the store: each is a node of its own, named by the prefix that it
holds."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from kvshare_mm.identity import DIGEST_SIZE, text_identity
from kvshare_mm.node import Node, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.tiered import TieredStore

_PREFIX = "state:"


def is_state(node: Node) -> bool:
    """Whether a stored node is a state and not a request."""
    return node.namespace.startswith(_PREFIX)


class StateStore:
    """Finds and keeps states by the tokens that they hold. Thread-safe.

    Args:
        store: where they are.
    """

    def __init__(self, store: TieredStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        # Of all namespaces, also of those that are gone: as many as the context has, at most.
        self._lengths = {int(name.split("-")[1]) for name in self._ids()}

    def longest(self, ns: str, keys: np.ndarray, most: int) -> int:
        """Length of the longest prefix, of `most` positions at most, whose state is kept; 0: none.

        Args:
            keys: ``[N]`` uint64 alignment keys.
        """
        named = self._named(ns, keys[:most])
        return max((n for n, name in named if self._store.resident(name)), default=0)

    def get(self, ns: str, keys: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The state behind all of `keys`. Raises KVUnavailableError."""
        kv = self._store.get(_name(ns, keys), _PREFIX + ns).kv
        return kv.k.reshape(-1), kv.v.reshape(-1)

    def put(self, ns: str, keys: np.ndarray, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep the state behind all of `keys`, on the CPU; one that is kept already counts as used.

        Raises:
            NotFiniteError: there is something in it that is no number.
        """
        name = _name(ns, keys)
        with self._lock:
            self._lengths.add(len(keys))
        if self._store.resident(name):
            self._store.touch(name)
            return
        node = Node(
            node_id=name,
            namespace=_PREFIX + ns,
            align_keys=np.zeros(1, np.uint64),
            own=(Span(0, 1),),
            created_s=time.time(),
        )
        k, v = (side[None, None, None] for side in state)
        self._store.put(StoredNode(node, NodeKV(k, v)))

    def forget(self, ns: str, keys: np.ndarray) -> None:
        """Delete the states behind all prefixes of `keys`."""
        for _, name in self._named(ns, keys):
            self._store.delete(name)

    def clear(self, ns: str | None = None) -> None:
        """Delete all states, or those of a namespace."""
        for name in self._ids("" if ns is None else text_identity(ns)):
            self._store.delete(name)

    def _ids(self, begin: str = "") -> list[str]:
        return [name for name in self._store.ids() if name.startswith(_PREFIX + begin)]

    def _named(self, ns: str, keys: np.ndarray) -> Iterator[tuple[int, str]]:
        """Prefixes of `keys` that are as long as some state, and the names of theirs."""
        with self._lock:
            lengths = sorted(n for n in self._lengths if n <= len(keys))
        digest, done = hashlib.blake2b(digest_size=DIGEST_SIZE), 0
        for n in lengths:
            digest.update(_bytes(keys[done:n]))
            done = n
            yield n, f"{_PREFIX}{text_identity(ns)}-{n}-{digest.hexdigest()}"


def _name(ns: str, keys: np.ndarray) -> str:
    digest = hashlib.blake2b(_bytes(keys), digest_size=DIGEST_SIZE).hexdigest()
    return f"{_PREFIX}{text_identity(ns)}-{len(keys)}-{digest}"


def _bytes(keys: np.ndarray) -> bytes:
    return np.ascontiguousarray(keys, "<u8").tobytes()
