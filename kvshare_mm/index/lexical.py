"""Finds donors by shared n-grams of alignment keys, in memory: the answer that comes first.

What can be reused is shared *tokens*, and n-grams see exactly those. The index is rebuilt from the
store at start; nothing here is persistent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.index.base import Candidate, IndexRecord
from kvshare_mm.index.ngrams import NGRAM, smallest_ngrams
from kvshare_mm.index.postings import Postings, PostingsIndex, ranges

_U64 = NDArray[np.uint64]

_TAIL = 32
"""Postings read, newest first, of an n-gram too common to be read in full."""

_TAIL_NGRAMS = 64
"""So many of the too common n-grams are read at all, the rarest of them."""

_RESCORED = 16
"""Candidates whose shared n-grams are all counted when postings were cut short (10 us each), and
half as many again from the tails."""


_MANY = 4
"""From so many times as many records as postings on, postings are sorted to be summed up."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Distinct n-grams of a record: ``ngrams [U]`` uint64 ascending, and which share they are."""

    ngrams: _U64
    rate: float


def _search(
    postings: Postings[_Sample], query: _U64, rate: float, limit: int, budget: int
) -> list[Candidate]:
    """Rank records by the weights of the n-grams they share with `query` (ascending)."""
    if not postings.runs:  # all live records are shorter than n
        return []
    # [runs, Q]: where the postings of each n-gram begin and end in each run.
    left, right = np.stack([run.holders(query) for run in postings.runs], axis=1)
    frequency = (right - left).sum(axis=0)
    if not frequency.any():
        return []
    # An n-gram that every record has (a template's) tells nothing about which to prefer.
    weights = np.log((len(postings.ids) + 1) / np.maximum(frequency, 1))
    rarest_first = np.argsort(frequency, kind="stable")
    cut = np.empty(len(query), dtype=bool)
    cut[rarest_first] = np.cumsum(frequency[rarest_first]) > budget

    scores = _best(postings, weights, np.where(cut, right, left), right, max(limit, _RESCORED))
    if cut.any():
        # Apart from the above: else the newest records would gather points for a template
        # which older ones share just as well, and push out an older and better donor.
        sampled = rarest_first[cut[rarest_first]][:_TAIL_NGRAMS]
        newest = right.copy()
        newest[:, sampled] = np.maximum(left, right - _TAIL)[:, sampled]
        recent = _best(postings, weights, newest, right, max(limit, _RESCORED // 2))
        # All the newest may be removed records: then, and only then, read everything.
        best = scores | recent or _best(postings, weights, left, right, limit)
        scores = _shared(postings, query, weights, list(best))
    # Of two bottom-k samples only the hashes below both thresholds can meet.
    ranked = [
        (score / min(rate, postings.values[slot].rate), slot) for slot, score in scores.items()
    ]
    ranked.sort(reverse=True)
    return [Candidate(postings.ids[slot], score) for score, slot in ranked[:limit]]


def _best(
    postings: Postings[_Sample],
    weights: NDArray[np.float64],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    count: int,
) -> dict[int, float]:
    """Sum weights over the postings ``begin:end [runs, Q]``; the `count` best live slots."""
    slots, lengths = [], []
    for run, first, last in zip(postings.runs, begin, end, strict=True):
        lengths.append(last - first)
        slots.append(run.slots[ranges(first, lengths[-1])])
    repeated = np.repeat(np.tile(weights, len(lengths)), np.concatenate(lengths))
    found, scores = _sums(np.concatenate(slots), repeated, len(postings.ids))
    live = postings.alive[found]
    found, scores = found[live], scores[live]
    if not len(found):
        return {}
    count = min(count, len(found))
    threshold = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > threshold)
    # Of equal records the newest, whose KV is likeliest to be in a near tier.
    equal = np.flatnonzero(scores == threshold)[len(above) - count :]
    top = np.concatenate((above, equal))
    return dict(zip(found[top].tolist(), scores[top].tolist(), strict=True))


def _sums(
    slots: NDArray[np.int32], weights: NDArray[np.float64], count: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The distinct `slots`, ascending, whose weights do not sum up to 0, and the sums.

    Args:
        count: of slots that there may be. Where they are many, sorting beats a sum for each: 0.2 ms
            instead of 2 for 8,000 of 250,000.
    """
    if count > _MANY * len(slots):
        distinct, places = np.unique(slots, return_inverse=True)
        sums = np.bincount(places, weights)
        some = sums != 0
        return distinct[some], sums[some]
    sums = np.bincount(slots, weights, minlength=count)
    found = np.flatnonzero(sums)
    return found, sums[found]


def _shared(
    postings: Postings[_Sample], query: _U64, weights: NDArray[np.float64], slots: Sequence[int]
) -> dict[int, float]:
    """The weights of all n-grams that each of `slots` shares with the query."""
    stored = [postings.values[slot].ngrams for slot in slots]
    flat = np.concatenate(stored)
    at = np.minimum(np.searchsorted(query, flat), len(query) - 1)
    of = np.repeat(np.arange(len(slots)), [len(ngrams) for ngrams in stored])
    scores = np.bincount(of, weights[at] * (query[at] == flat), minlength=len(slots))
    return dict(zip(slots, scores.tolist(), strict=True))


def _share(query: _U64, rate: float, sample: _Sample) -> float:
    """Of the distinct n-grams of a prompt, how many a record has."""
    # Up to here both samples have all hashes.
    ends = [ngrams[-1] for ngrams, r in ((query, rate), (sample.ngrams, sample.rate)) if r < 1]
    both = query[: np.searchsorted(query, min(ends), "right")] if ends else query
    if not len(both):
        return 0.0
    at = np.minimum(np.searchsorted(sample.ngrams, both), len(sample.ngrams) - 1)
    return float((sample.ngrams[at] == both).mean())


class LexicalIndex(PostingsIndex[_Sample]):
    """Inverted lists over unique n-grams, one set per namespace. Safe to use from many threads.

    A record's score is the sum over shared n-grams of ``log((records + 1) / records with it)``.
    Rare n-grams are read in full; when they and the common ones together have more than `budget`
    postings, the most common are read only in their newest part, and the best records found so
    are then scored exactly. So a store filled from one template still tells its records apart.

    Memory is 12 bytes per unique n-gram of a record and 16 more for one that no other has, at most
    ``28 * max_ngrams``, plus about 0.5 KiB per record: 5 to 12 KiB for a prompt of 400 tokens.
    Removed records keep theirs until a quarter of a namespace is dead. Longer prompts are sampled
    (the smallest hashes, the same in every prompt) and scores scaled up, so long and short prompts
    stay comparable.

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
        max_ngrams: int = 1024,
        max_query_ngrams: int = 1024,
        budget: int = 32768,
    ) -> None:
        if min(n, max_ngrams, max_query_ngrams, budget) < 1:
            raise ValueError("n, max_ngrams, max_query_ngrams and budget must be at least 1")
        super().__init__(posting_bytes=8)  # the n-gram once more by record
        self.n = n
        self._max_ngrams = max_ngrams
        self._max_query_ngrams = max_query_ngrams
        self._budget = budget

    def add(self, records: Sequence[IndexRecord]) -> None:
        """Store records; a node id that is known already is replaced.

        Adding many at once is much cheaper than one by one. A prompt shorter than n has no
        n-grams: it is counted, but never found.
        """
        sampled: dict[str, list[tuple[str, _Sample, _U64]]] = {}
        for record in {record.node_id: record for record in records}.values():
            sample = _Sample(*smallest_ngrams(record.align_keys, self._max_ngrams, self.n))
            added = sampled.setdefault(record.namespace, [])
            added.append((record.node_id, sample, sample.ngrams))
        self._put(sampled)

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
            return _search(postings, query, rate, limit, self._budget) if postings else []

    def closest(
        self, namespaces: Iterable[str], keys: NDArray[np.uint64], limit: int
    ) -> dict[str, tuple[str, float]]:
        """In each namespace, of the `limit` records that rank first, the one that has most of the
        distinct n-grams of `keys`, and how many, 0 to 1. Where none is found it is left out.

        All n-grams that are kept are compared, also where fewer are looked up. Of longer prompts
        than are kept in full it is an estimate.
        """
        query, rate = smallest_ngrams(keys, self._max_ngrams, self.n)
        if not len(query):
            return {}
        first = query[: self._max_query_ngrams]
        first_rate = rate * len(first) / len(query)
        found = {}
        for namespace in namespaces:
            with self._lock:
                postings = self._namespaces.get(namespace)
                if postings is None:
                    continue
                ranked = _search(postings, first, first_rate, limit, self._budget)
                samples = postings.values_of([candidate.node_id for candidate in ranked])
            shares = {name: _share(query, rate, sample) for name, sample in samples.items()}
            if shares:
                found[namespace] = max(shares.items(), key=itemgetter(1))
        return found
