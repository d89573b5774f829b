"""Inverted lists that grow and shrink while they are searched.

Postings are kept in sorted runs, few and of growing size, as in a log-structured merge tree. A new
record is a run of its own, small ones are merged at once; what takes longer (merging large runs,
leaving out removed records) is done by a thread beside, which holds the lock only to swap the
result in. So nobody waits for more than a few microseconds, however many records there are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

_U64 = NDArray[np.uint64]

_RUN_RATIO = 4
"""A run is merged into its elder unless the elder is this many times larger: few runs to search,
and each posting is moved only a logarithmic number of times."""

_AT_ONCE = 1 << 16
"""Postings that are merged by who adds: less than a millisecond."""

_FEW = 32
"""Removed records that are not worth a thread."""

_RECORD_BYTES = 300
"""Of Python's objects for a record: its id and places in two lists and a dict."""


@dataclass(frozen=True, slots=True)
class Run:
    """Postings sorted by (hash, slot): ``hashes [P]`` uint64, ``slots [P]`` int32."""

    hashes: _U64
    slots: NDArray[np.int32]


def merged(runs: Sequence[Run]) -> Run:
    """One run of several, the older ones first."""
    hashes = np.concatenate([run.hashes for run in runs])
    # Stable, and every slot of a newer run is above those of older ones: (hash, slot) order.
    order = np.argsort(hashes, kind="stable")
    return Run(hashes[order], np.concatenate([run.slots for run in runs])[order])


class Postings(Generic[T]):
    """The records of one namespace. Slots number them in order of arrival.

    All methods but `settle` are called with `lock` held.

    Args:
        lock: guards it, and all that reads it.

    Attributes:
        runs: the postings.
        ids, values: by slot.
        alive: ``[capacity]`` bool by slot: it was not removed.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.runs: list[Run] = []
        self.ids: list[str] = []
        self.values: list[T] = []
        self.alive = np.zeros(16, dtype=bool)
        self._slots: dict[str, int] = {}
        self._lock = lock
        self._frozen = 0  # so many of the first runs are being worked on
        self._tidying: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def num_bytes(self, posting_bytes: int) -> int:
        """Bytes held; removed records count until they are left out."""
        count = sum(len(run.hashes) for run in self.runs)
        return posting_bytes * count + self.alive.nbytes + _RECORD_BYTES * len(self.ids)

    def add(self, records: Sequence[tuple[str, T, _U64]]) -> None:
        """Add new records: (id, value, ``[U]`` hashes) of each."""
        first = len(self.ids)
        self.ids += [node_id for node_id, _, _ in records]
        self.values += [value for _, value, _ in records]
        if len(self.ids) > len(self.alive):
            grown = np.zeros(2 * len(self.ids), dtype=bool)
            grown[:first] = self.alive[:first]
            self.alive = grown
        self.alive[first : len(self.ids)] = True
        self._slots.update(zip(self.ids[first:], range(first, len(self.ids)), strict=True))
        hashes = [hashes for _, _, hashes in records]
        slots = np.arange(first, len(self.ids), dtype=np.int32)
        new = Run(np.concatenate(hashes), np.repeat(slots, [len(h) for h in hashes]))
        if len(new.hashes):
            self.runs.append(merged([new]))
        begin = self._unbalanced()
        if begin is not None and begin >= self._frozen:
            last = self.runs[begin:]
            if sum(len(run.hashes) for run in last) <= _AT_ONCE:
                self.runs[begin:] = [merged(last)]
        self._tidy()

    def remove(self, node_id: str) -> None:
        """Remove a record that is here."""
        self.alive[self._slots.pop(node_id)] = False
        self._tidy()

    def settle(self) -> None:
        """Wait until nothing is being tidied. Without the lock."""
        while (thread := self._tidying) is not None:
            thread.join()

    def _unbalanced(self) -> int | None:
        """Where the last runs begin that should be one."""
        begin = len(self.runs) - 1
        size = len(self.runs[-1].hashes) if self.runs else 0
        while begin > 0 and len(self.runs[begin - 1].hashes) <= _RUN_RATIO * size:
            begin -= 1
            size += len(self.runs[begin].hashes)
        return begin if begin < len(self.runs) - 1 else None

    @property
    def _decayed(self) -> bool:
        removed = len(self.ids) - len(self._slots)
        return removed > _FEW and removed * 4 > len(self.ids)

    def _tidy(self) -> None:
        if self._tidying is None and (self._decayed or self._unbalanced() is not None):
            self._tidying = threading.Thread(target=self._work, name="kvshare-index", daemon=True)
            self._tidying.start()

    # -- the thread beside ------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._decayed:
                    step = self._compact
                elif self._unbalanced() is not None:
                    step = self._merge
                else:
                    self._tidying = None
                    return
            try:
                step()
            except Exception:
                # Nothing was changed: it is searched as it is, and tidied when more is added.
                logger.exception("an index could not be tidied")
                with self._lock:
                    self._frozen = 0
                    self._tidying = None
                return

    def _merge(self) -> None:
        with self._lock:
            begin = self._unbalanced()
            if begin is None:
                return
            last = self.runs[begin:]
            self._frozen = len(self.runs)
        one = merged(last)
        with self._lock:
            self.runs[begin : self._frozen] = [one]
            self._frozen = 0

    def _compact(self) -> None:
        """Leave removed records out."""
        with self._lock:
            n = len(self.ids)
            alive = self.alive[:n].copy()
            ids, values, runs = self.ids[:n], self.values[:n], list(self.runs)
            self._frozen = len(runs)
        number = np.cumsum(alive, dtype=np.int32) - np.int32(1)
        kept = []
        for run in runs:
            still_here = alive[run.slots]
            kept.append(Run(run.hashes[still_here], number[run.slots[still_here]]))
        one = merged(kept) if kept else None
        mask = alive.tolist()
        ids, values = list(compress(ids, mask)), list(compress(values, mask))
        slots = dict(zip(ids, range(len(ids)), strict=True))
        shift = np.int32(len(ids) - n)
        with self._lock:
            newer = self.runs[self._frozen :]
            still = np.concatenate((self.alive[:n][alive], self.alive[n : len(self.ids)]))
            for gone in np.flatnonzero(~still[: len(ids)]).tolist():
                del slots[ids[gone]]
            ids += self.ids[n:]
            values += self.values[n:]
            for slot in range(len(ids) - len(self.ids[n:]), len(ids)):
                if still[slot]:
                    slots[ids[slot]] = slot
            self.runs = [one] if one is not None and len(one.hashes) else []
            self.runs += [Run(run.hashes, run.slots + shift) for run in newer]
            self.alive = np.concatenate((still, np.zeros(len(still) + 16, dtype=bool)))
            self.ids, self.values, self._slots = ids, values, slots
            self._frozen = 0


class PostingsIndex(Generic[T]):
    """Postings of many namespaces. Safe to use from many threads.

    Args:
        posting_bytes: bytes of a posting, those of the values included.
    """

    def __init__(self, posting_bytes: int) -> None:
        self._lock = threading.Lock()
        self._namespaces: dict[str, Postings[T]] = {}
        self._posting_bytes = posting_bytes
        self._where: dict[str, str] = {}
        self._counted: dict[str, int] = {}
        self._num_bytes = 0

    def remove(self, node_ids: Iterable[str]) -> None:
        """Forget nodes; unknown ids are not an error."""
        with self._lock:
            self._remove(node_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes that the index takes, up to what is being tidied."""
        return self._num_bytes

    def settle(self) -> None:
        """Wait until nothing is being tidied beside."""
        for postings in list(self._namespaces.values()):
            postings.settle()

    def __len__(self) -> int:
        return len(self._where)

    def _put(self, records: Mapping[str, Sequence[tuple[str, T, _U64]]]) -> None:
        """Add records by namespace; those of known ids are replaced."""
        with self._lock:
            for namespace, added in records.items():
                self._remove(node_id for node_id, _, _ in added)
                if namespace not in self._namespaces:
                    self._namespaces[namespace] = Postings(self._lock)
                self._namespaces[namespace].add(added)
                self._where.update((node_id, namespace) for node_id, _, _ in added)
                self._count(namespace)

    def _remove(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            namespace = self._where.pop(node_id, None)
            if namespace is not None:
                postings = self._namespaces[namespace]
                postings.remove(node_id)
                if not len(postings):
                    del self._namespaces[namespace]
                self._count(namespace)

    def _count(self, namespace: str) -> None:
        """Take a namespace's size anew; what is tidied is seen when it is used next."""
        postings = self._namespaces.get(namespace)
        self._num_bytes -= self._counted.pop(namespace, 0)
        if postings is not None:
            self._counted[namespace] = postings.num_bytes(self._posting_bytes)
            self._num_bytes += self._counted[namespace]
