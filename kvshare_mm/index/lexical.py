"""Finds donors by shared n-grams of alignment keys, in memory: the answer that comes first.

What can be reused is shared *tokens*, and n-grams see exactly those. The index is rebuilt from the
store at start; nothing here is persistent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.index.base import Candidate, IndexRecord
from kvshare_mm.index.ngrams import NGRAM, smallest_ngrams

logger = logging.getLogger(__name__)

_U64 = NDArray[np.uint64]

_RUN_RATIO = 4
"""A run is merged into its elder unless the elder is this many times larger: few runs to search,
and each posting is moved only a logarithmic number of times."""

_TAIL = 32
"""Postings read, newest first, of an n-gram too common to be read in full."""

_TAIL_NGRAMS = 64
"""So many of the too common n-grams are read at all, the rarest of them."""

_RESCORED = 16
"""Candidates whose shared n-grams are counted one by one when postings were cut short (20 us
each), and half as many again from the tails."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Postings sorted by (hash, slot): ``hashes [P]`` uint64, ``slots [P]`` int32."""

    hashes: _U64
    slots: NDArray[np.int32]


def _merge(older: _Run, newer: _Run) -> _Run:
    hashes = np.concatenate((older.hashes, newer.hashes))
    # Stable, and every slot of `newer` is above those of `older`: (hash, slot) order survives.
    order = np.argsort(hashes, kind="stable")
    return _Run(hashes[order], np.concatenate((older.slots, newer.slots))[order])


class _Postings:
    """The inverted lists of one namespace. Slots number its records in order of arrival."""

    def __init__(self) -> None:
        self.node_ids: list[str] = []
        self.ngrams: list[_U64] = []
        self.rates: list[float] = []
        self.dead: set[int] = set()
        self.runs: list[_Run] = []

    @property
    def num_live(self) -> int:
        return len(self.node_ids) - len(self.dead)

    def append(self, added: Sequence[tuple[str, _U64, float]]) -> list[int]:
        """Store ``(node id, ngrams [U] uint64 ascending, sampling rate)``; returns the slots."""
        first = len(self.node_ids)
        self.node_ids += [node_id for node_id, _, _ in added]
        self.ngrams += [ngrams for _, ngrams, _ in added]
        self.rates += [rate for _, _, rate in added]
        slots = list(range(first, len(self.node_ids)))
        lengths = [len(ngrams) for _, ngrams, _ in added]
        hashes = np.concatenate([ngrams for _, ngrams, _ in added])
        order = np.argsort(hashes, kind="stable")
        run = _Run(hashes[order], np.repeat(np.array(slots, dtype=np.int32), lengths)[order])
        while self.runs and len(self.runs[-1].hashes) <= _RUN_RATIO * len(run.hashes):
            run = _merge(self.runs.pop(), run)
        self.runs.append(run)
        return slots

    def compact(self) -> dict[str, int]:
        """Drop dead records; returns the new slot of every live node."""
        alive = np.ones(len(self.node_ids), dtype=bool)
        alive[list(self.dead)] = False
        renumbered = np.cumsum(alive, dtype=np.int32) - 1
        runs = []
        for run in self.runs:
            kept = alive[run.slots]
            runs.append(_Run(run.hashes[kept], renumbered[run.slots[kept]].astype(np.int32)))
        live = np.flatnonzero(alive).tolist()
        self.node_ids = [self.node_ids[slot] for slot in live]
        self.ngrams = [self.ngrams[slot] for slot in live]
        self.rates = [self.rates[slot] for slot in live]
        self.runs = [run for run in runs if len(run.hashes)]
        self.dead = set()
        return {node_id: slot for slot, node_id in enumerate(self.node_ids)}

    def search(self, query: _U64, rate: float, limit: int, budget: int) -> list[Candidate]:
        """Rank records by the weights of the n-grams they share with `query` (ascending)."""
        if not self.runs:  # all live records are shorter than n
            return []
        # [runs, Q]: where the postings of each n-gram begin and end in each run.
        left = np.stack([np.searchsorted(run.hashes, query, side="left") for run in self.runs])
        right = np.stack([np.searchsorted(run.hashes, query, side="right") for run in self.runs])
        frequency = (right - left).sum(axis=0)
        if not frequency.any():
            return []
        # An n-gram that every record has (a template's) tells nothing about which to prefer.
        weights = np.log((len(self.node_ids) + 1) / np.maximum(frequency, 1))
        rarest_first = np.argsort(frequency, kind="stable")
        cut = np.empty(len(query), dtype=bool)
        cut[rarest_first] = np.cumsum(frequency[rarest_first]) > budget

        scores = self._best(weights, np.where(cut, right, left), right, max(limit, _RESCORED))
        if cut.any():
            # Apart from the above: else the newest records would gather points for a template
            # which older ones share just as well, and push out an older and better donor.
            sampled = rarest_first[cut[rarest_first]][:_TAIL_NGRAMS]
            newest = right.copy()
            newest[:, sampled] = np.maximum(left, right - _TAIL)[:, sampled]
            recent = self._best(weights, newest, right, max(limit, _RESCORED // 2))
            # All the newest may be removed records: then, and only then, read everything.
            best = scores | recent or self._best(weights, left, right, limit)
            scores = {slot: self._shared(query, weights, slot) for slot in best}
        # Of two bottom-k samples only the hashes below both thresholds can meet.
        ranked = [(score / min(rate, self.rates[slot]), slot) for slot, score in scores.items()]
        ranked.sort(reverse=True)
        return [Candidate(self.node_ids[slot], score) for score, slot in ranked[:limit]]

    def _best(
        self,
        weights: NDArray[np.float64],
        begin: NDArray[np.int64],
        end: NDArray[np.int64],
        count: int,
    ) -> dict[int, float]:
        """Sum weights over the postings ``begin:end [runs, Q]``; the `count` best live slots."""
        scores = np.zeros(len(self.node_ids))
        for run, first, last in zip(self.runs, begin, end, strict=True):
            lengths = last - first
            offsets = np.cumsum(lengths)
            # The indices first[i]..last[i] - 1 of all n-grams, one after the other.
            flat = np.arange(offsets[-1]) + np.repeat(last - offsets, lengths)
            scores += np.bincount(
                run.slots[flat], weights=np.repeat(weights, lengths), minlength=len(scores)
            )
        scores[list(self.dead)] = 0.0
        count = min(count, len(scores))
        threshold = np.partition(scores, -count)[-count]
        above = np.flatnonzero(scores > threshold)
        # Of equal records the newest, whose KV is likeliest to be in a near tier.
        equal = np.flatnonzero(scores == threshold)[len(above) - count :]
        top = np.concatenate((above, equal)).tolist()
        return {slot: float(scores[slot]) for slot in top if scores[slot] > 0}

    def _shared(self, query: _U64, weights: NDArray[np.float64], slot: int) -> float:
        stored = self.ngrams[slot]
        found = np.minimum(np.searchsorted(stored, query), len(stored) - 1)
        return float(weights[stored[found] == query].sum())


class LexicalIndex:
    """Inverted lists over unique n-grams, one set per namespace. Safe to use from many threads.

    A record's score is the sum over shared n-grams of ``log((records + 1) / records with it)``.
    Rare n-grams are read in full; when they and the common ones together have more than `budget`
    postings, the most common are read only in their newest part, and the best records found so
    are then scored exactly. So a store filled from one template still tells its records apart.

    Memory is 20 bytes per unique n-gram kept, at most ``20 * max_ngrams`` plus about 0.5 KiB per
    record: 8 KiB for a prompt of 400 tokens. Removed records keep theirs until a quarter of a
    namespace is dead. Longer prompts are sampled (the smallest hashes, the same in every prompt)
    and scores scaled up, so long and short prompts stay comparable.

    Args:
        n: n-gram length in positions.
        max_ngrams: most n-grams kept of one record.
        max_query_ngrams: most n-grams looked up in one search.
        budget: postings read in full in one search.
    """

    def __init__(
        self,
        n: int = NGRAM,
        *,
        max_ngrams: int = 4096,
        max_query_ngrams: int = 1024,
        budget: int = 32768,
    ) -> None:
        if min(n, max_ngrams, max_query_ngrams, budget) < 1:
            raise ValueError("n, max_ngrams, max_query_ngrams and budget must be at least 1")
        self.n = n
        self._max_ngrams = max_ngrams
        self._max_query_ngrams = max_query_ngrams
        self._budget = budget
        self._lock = threading.Lock()
        self._namespaces: dict[str, _Postings] = {}
        self._where: dict[str, tuple[str, int]] = {}

    def add(self, records: Sequence[IndexRecord]) -> None:
        """Store records; a node id that is known already is replaced.

        Adding many at once is much cheaper than one by one. A prompt shorter than n has no
        n-grams: it is counted, but never found.
        """
        latest = {record.node_id: record for record in records}
        sampled: dict[str, list[tuple[str, _U64, float]]] = {}
        for record in latest.values():
            ngrams, rate = smallest_ngrams(record.keys, self._max_ngrams, self.n)
            sampled.setdefault(record.namespace, []).append((record.node_id, ngrams, rate))
        with self._lock:
            self._remove(latest)
            for namespace, added in sampled.items():
                slots = self._namespaces.setdefault(namespace, _Postings()).append(added)
                for (node_id, _, _), slot in zip(added, slots, strict=True):
                    self._where[node_id] = (namespace, slot)

    def remove(self, node_ids: Iterable[str]) -> None:
        """Forget nodes; unknown ids are not an error."""
        with self._lock:
            self._remove(node_ids)

    def search(self, namespace: str, keys: NDArray[np.uint64], limit: int) -> list[Candidate]:
        """The records of `namespace` sharing most with `keys`, best first.

        Args:
            namespace: only its records are looked at.
            keys: ``[N]`` uint64 alignment keys of the new prompt.
            limit: most candidates returned.

        Returns:
            At most `limit` candidates, each sharing at least one n-gram.
        """
        query, rate = smallest_ngrams(keys, self._max_query_ngrams, self.n)
        if limit < 1 or not len(query):
            return []
        with self._lock:
            postings = self._namespaces.get(namespace)
            return postings.search(query, rate, limit, self._budget) if postings else []

    def __len__(self) -> int:
        return len(self._where)

    def _remove(self, node_ids: Iterable[str]) -> None:
        touched = set()
        for node_id in node_ids:
            known = self._where.pop(node_id, None)
            if known is not None:
                namespace, slot = known
                self._namespaces[namespace].dead.add(slot)
                touched.add(namespace)
        for namespace in touched:
            postings = self._namespaces[namespace]
            if not postings.num_live:
                del self._namespaces[namespace]
            elif len(postings.dead) * 4 > len(postings.node_ids):
                logger.debug("compacting %s: %d dead", namespace, len(postings.dead))
                for node_id, slot in postings.compact().items():
                    self._where[node_id] = (namespace, slot)
