"""The dense index beside the critical path: when it cannot be opened, and when it can again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.index.base import Candidate, IndexRecord, IndexUnavailableError
from kvshare_mm.index.semantic import SemanticIndex


class Memory:
    """A dense index that finds everything it holds."""

    def __init__(self) -> None:
        self.held: dict[str, IndexRecord] = {}

    def reconcile(self, records: Sequence[IndexRecord]) -> None:
        self.held = {r.node_id: r for r in records}

    def add(self, records: Sequence[IndexRecord]) -> None:
        self.held |= {r.node_id: r for r in records}

    def remove(self, node_ids: Sequence[str]) -> None:
        for node_id in node_ids:
            self.held.pop(node_id, None)

    def search_dense(self, namespace: str, vector: np.ndarray, limit: int) -> list[Candidate]:
        return [Candidate(node_id, 1.0) for node_id in list(self.held)[:limit]]

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Door:
    """Opens the index once `failures` attempts have failed."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.attempts = failures, error, 0
        self.index = Memory()

    def __call__(self):
        self.attempts += 1
        if self.attempts <= self.failures:
            raise self.error
        return self.index, lambda text: np.full(4, 0.5, np.float32)


def _record(node_id: str) -> IndexRecord:
    return IndexRecord(node_id, "ns", np.arange(4, dtype=np.uint64))


def _semantic(door: Door, known: Sequence[IndexRecord] = (), retry_after: float = 0.0):
    counters: Counter[str] = Counter()
    index = SemanticIndex(door, known, lambda *_: None, counters, retry_after)
    assert index.flush(10)
    return index, counters


def test_a_server_that_comes_up_late_is_used() -> None:
    door = Door(1, IndexUnavailableError("down"))
    index, counters = _semantic(door, [_record("old"), _record("dropped")])
    assert index.search("ns", "text", 4) == ()
    index.add(_record("new"), "text")
    assert index.flush(10)
    assert set(index.search("ns", "text", 4)) == {"old", "dropped", "new"}
    assert (counters["dense_open_failed"], counters["dense_insert_skipped"]) == (1, 0)
    index.close()


def test_what_was_removed_while_it_was_down_does_not_come_back() -> None:
    door = Door(2, IndexUnavailableError("down"))
    index, _ = _semantic(door, [_record("old"), _record("dropped")])
    index.remove("dropped")
    index.add(_record("new"), "text")
    assert index.flush(10)
    assert set(index.search("ns", "text", 4)) == {"old", "new"}
    index.close()


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [(IndexUnavailableError("down"), 60.0), (ModelLoadError("no embedder"), 0.0)],
)
def test_it_is_left_alone(error: Exception, retry_after: float) -> None:
    door = Door(1, error)
    index, counters = _semantic(door, retry_after=retry_after)
    index.add(_record("new"), "text")
    assert index.flush(10)
    assert (door.attempts, counters["dense_insert_skipped"]) == (1, 1)
    index.close()
