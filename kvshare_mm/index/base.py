"""What a search index keeps per stored request, and what it can be asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvshare_mm.errors import KVShareError


class IndexUnavailableError(KVShareError):
    """The index cannot be reached or failed. A miss for the request, never its failure."""


class IndexLeftAloneError(IndexUnavailableError):
    """The index failed a moment ago and was not asked again."""


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """One stored request as the index sees it.

    Attributes:
        node_id: id of the DELTA-tree node.
        namespace: requests see only records of their own namespace.
        align_keys: ``[N]`` uint64 alignment keys.
        embedding: ``[dim]`` float32, unit length, or None if there is none (yet).
    """

    node_id: str
    namespace: str
    align_keys: np.ndarray
    embedding: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible donor. `score` orders candidates of one index; it is not comparable across."""

    node_id: str
    score: float


class DenseIndex(Protocol):
    """A search index over embeddings, shared or on disk. Evidence only: the planner decides. Every
    method may raise IndexUnavailableError."""

    def add(self, records: Sequence[IndexRecord]) -> None: ...

    def remove(self, node_ids: Iterable[str]) -> None:
        """Forget nodes; unknown ids are not an error."""

    def search_dense(
        self, namespace: str, embedding: np.ndarray, limit: int
    ) -> list[Candidate]: ...

    def reconcile(self, records: Sequence[IndexRecord]) -> object:
        """Make the index hold exactly these records of ours."""

    def flush(self) -> None: ...

    def close(self) -> None: ...
