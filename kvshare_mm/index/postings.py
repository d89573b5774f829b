"""Inverted lists that grow and shrink while they are searched.

Postings are kept in sorted runs, few and of growing size, as in a log-structured merge tree. A new
record is a run of its own, small ones are merged at once; what takes longer (merging large runs,
leaving out removed records) is done by a thread beside, which holds the lock only to swap the
result in. So nobody waits for more than a few microseconds, however many records there are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
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

_PIECE = 1 << 17
"""Postings that are merged in one go: a few milliseconds."""

_FEW = 32
"""Removed records that are not worth a thread."""

_RECORD_BYTES = 300
"""Of Python's objects for a record: its id and places in two lists and a dict."""


@dataclass(frozen=True, slots=True)
class Run:
    """Postings sorted by (hash, slot).

    Attributes:
        hashes: ``[U]`` uint64 distinct, ascending.
        starts: ``[U + 1]`` int64: where the slots of each hash begin, and where the last end.
        slots: ``[P]`` int32.
    """

    hashes: _U64
    starts: NDArray[np.int64]
    slots: NDArray[np.int32]

    @property
    def num_bytes(self) -> int:
        return self.hashes.nbytes + self.starts.nbytes + self.slots.nbytes

    def holders(self, query: _U64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where in `slots` those of each hash of ``query [Q]`` begin and end."""
        at = np.minimum(np.searchsorted(self.hashes, query), len(self.hashes) - 1)
        begin = self.starts[at]
        return begin, np.where(self.hashes[at] == query, self.starts[at + 1], begin)

    def split(self, borders: _U64) -> list[tuple[int, int]]:
        """Where the hashes begin and end that are below, between and above the `borders`."""
        at = [0, *np.searchsorted(self.hashes, borders).tolist(), len(self.hashes)]
        return list(pairwise(at))

    def part(self, begin: int, end: int) -> Run:
        """The postings of hashes ``begin:end``."""
        starts = self.starts[begin : end + 1]
        return Run(self.hashes[begin:end], starts - starts[0], self.slots[starts[0] : starts[-1]])

    def only(self, alive: NDArray[np.bool_], number: NDArray[np.int32]) -> Run:
        """The postings of slots that are `alive`, by their new `number`; both by slot."""
        kept = alive[self.slots]
        before = np.concatenate(([0], np.cumsum(kept)))[self.starts]
        some = np.diff(before) > 0
        starts = np.append(before[:-1][some], before[-1])
        return Run(self.hashes[some], starts, number[self.slots[kept]])


_EMPTY = Run(np.empty(0, np.uint64), np.zeros(1, np.int64), np.empty(0, np.int32))


def ranges(begin: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers ``begin[i] .. begin[i] + lengths[i] - 1`` of all i, one after the other."""
    ends = np.cumsum(lengths)
    count = int(ends[-1]) if len(ends) else 0
    return np.arange(count) + np.repeat(begin + lengths - ends, lengths)


def merged(runs: Sequence[Run], change: Callable[[Run], Run] = lambda run: run) -> Run:
    """One run of several, the older ones first, each with a `change` to its postings.

    Done in pieces: much of numpy holds the interpreter's lock, and others search meanwhile.
    """
    largest = max(runs, key=lambda run: len(run.slots))
    pieces = np.searchsorted(largest.starts, np.arange(_PIECE, len(largest.slots), _PIECE))
    borders = largest.hashes[np.unique(pieces[pieces < len(largest.hashes)])]
    parts = [
        _merged([change(run.part(a, b)) for run, (a, b) in zip(runs, edges, strict=True)])
        for edges in zip(*(run.split(borders) for run in runs), strict=True)
    ]
    before = np.cumsum([0, *(len(part.slots) for part in parts[:-1])])
    return Run(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate(
            [part.starts[:-1] + n for part, n in zip(parts, before, strict=True)]
            + [[before[-1] + len(parts[-1].slots)]]
        ),
        np.concatenate([part.slots for part in parts]),
    )


def _merged(runs: Sequence[Run]) -> Run:
    hashes = np.concatenate([run.hashes for run in runs])
    lengths = np.concatenate([np.diff(run.starts) for run in runs])
    slots = np.concatenate([run.slots for run in runs])
    begin = np.cumsum(lengths) - lengths
    # Stable, and every slot of a newer run is above those of older ones: (hash, slot) order.
    order = np.argsort(hashes, kind="stable")
    hashes, lengths = hashes[order], lengths[order]
    first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
    starts = np.append((np.cumsum(lengths) - lengths)[first], len(slots))
    return Run(hashes[first], starts, slots[ranges(begin[order], lengths)])


def _run(hashes: Sequence[_U64], first: int) -> Run:
    """The postings of new records: ``[U]`` hashes of each, which have slots from `first` on."""
    flat = np.concatenate(hashes)
    slots = np.arange(first, first + len(hashes), dtype=np.int32)
    every = np.repeat(slots, [len(h) for h in hashes])
    order = np.argsort(flat, kind="stable")
    distinct, starts = np.unique(flat[order], return_index=True)
    return Run(distinct, np.append(starts, len(flat)), every[order])


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

    def values_of(self, node_ids: Iterable[str]) -> dict[str, T]:
        """The values of those of these records that are here."""
        slots = {node_id: self._slots.get(node_id) for node_id in node_ids}
        return {node_id: self.values[slot] for node_id, slot in slots.items() if slot is not None}

    def num_bytes(self, posting_bytes: int) -> int:
        """Bytes held; removed records count until they are left out."""
        count = sum(len(run.slots) for run in self.runs)
        held = sum(run.num_bytes for run in self.runs) + self.alive.nbytes
        return held + posting_bytes * count + _RECORD_BYTES * len(self.ids)

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
        new = _run([hashes for _, _, hashes in records], first)
        if len(new.slots):
            self.runs.append(new)
        begin = self._unbalanced()
        if begin is not None and begin >= self._frozen:
            last = self.runs[begin:]
            if sum(len(run.slots) for run in last) <= _AT_ONCE:
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
        size = len(self.runs[-1].slots) if self.runs else 0
        while begin > 0 and len(self.runs[begin - 1].slots) <= _RUN_RATIO * size:
            begin -= 1
            size += len(self.runs[begin].slots)
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
        one = merged(runs or [_EMPTY], lambda run: run.only(alive, number))
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
            self.runs = [one] if len(one.slots) else []
            self.runs += [replace(run, slots=run.slots + shift) for run in newer]
            self.alive = np.concatenate((still, np.zeros(len(still) + 16, dtype=bool)))
            self.ids, self.values, self._slots = ids, values, slots
            self._frozen = 0


class PostingsIndex(Generic[T]):
    """Postings of many namespaces. Safe to use from many threads.

    Args:
        posting_bytes: bytes of the values by posting.
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
