"""The dense index beside the critical path: when it cannot be opened, and when it can again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.index.base import Candidate, IndexLeftAloneError, IndexRecord, IndexUnavailableError
from kvshare_mm.index.semantic import SemanticIndex


class Memory:
    """A dense index that finds everything it holds, once `failures` attempts to reach it failed."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.attempts = failures, 0
        self.held: dict[str, IndexRecord] = {}
        self.flushed, self.quick = threading.Event(), threading.Event()
        self.quick.set()

    def reconcile(self, records: Sequence[IndexRecord]) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            # A client that failed is left alone every second time.
            raise (IndexUnavailableError if self.attempts % 2 else IndexLeftAloneError)("down")
        self.held = {r.node_id: r for r in records}

    def add(self, records: Sequence[IndexRecord]) -> None:
        self.held |= {r.node_id: r for r in records}

    def remove(self, node_ids: Sequence[str]) -> None:
        for node_id in node_ids:
            self.held.pop(node_id, None)

    def search_dense(self, namespace: str, vector: np.ndarray, limit: int) -> list[Candidate]:
        return [Candidate(node_id, 1.0) for node_id in list(self.held)[:limit]]

    def flush(self) -> None:
        self.flushed.set()
        assert self.quick.wait(60)

    def close(self) -> None: ...


def _embed(text: str) -> np.ndarray:
    return np.full(4, 0.5, np.float32)


def _record(node_id: str) -> IndexRecord:
    return IndexRecord(node_id, "ns", np.arange(4, dtype=np.uint64))


def _semantic(memory: Memory, known: Sequence[IndexRecord] = ()):
    counters: Counter[str] = Counter()
    index = SemanticIndex(lambda: (memory, _embed), known, lambda *_: None, counters)
    assert index.flush(60)
    return index, counters


def test_a_server_that_comes_up_late_is_used() -> None:
    index, counters = _semantic(Memory(1), [_record("old"), _record("dropped")])
    assert index.search("ns", "text", 4) == ()
    index.add(_record("new"), "text")
    assert index.flush(60)
    assert set(index.search("ns", "text", 4)) == {"old", "dropped", "new"}
    assert (counters["dense_open_failed"], counters["dense_insert_skipped"]) == (1, 0)
    index.close()


def test_what_was_removed_while_it_was_down_does_not_come_back() -> None:
    index, _ = _semantic(Memory(2), [_record("old"), _record("dropped")])
    index.remove("dropped")
    index.add(_record("new"), "text")
    assert index.flush(60)
    assert set(index.search("ns", "text", 4)) == {"old", "new"}
    index.close()


def test_while_it_is_down_nothing_is_embedded_or_searched() -> None:
    memory = Memory(99)
    index, counters = _semantic(memory)
    index.add(_record("new"), "text")
    assert index.flush(60)
    assert index.search("ns", "text", 4) == ()
    assert (memory.attempts, memory.held) == (2, {})
    assert counters == {"dense_open_failed": 1, "dense_insert_skipped": 1}
    index.close()


def test_an_embedder_that_cannot_be_loaded_is_not_tried_again() -> None:
    attempts = []

    def open_index():
        attempts.append(1)
        raise ModelLoadError("no embedder")

    counters: Counter[str] = Counter()
    index = SemanticIndex(open_index, (), lambda *_: None, counters)
    index.add(_record("new"), "text")
    assert index.flush(60)
    assert (len(attempts), counters["dense_insert_skipped"]) == (1, 1)
    index.close()


def test_who_waits_for_an_index_that_hangs_waits_no_longer_than_was_said() -> None:
    memory = Memory()
    index, _ = _semantic(memory)
    memory.flushed.clear()
    memory.quick.clear()
    index.add(_record("new"), "text")
    flushed: list[bool] = []
    flushing = threading.Thread(target=lambda: flushed.append(index.flush(0.1)), daemon=True)
    flushing.start()
    assert memory.flushed.wait(30)
    flushing.join(30)
    assert flushed == [False]
    memory.quick.set()
    assert index.flush(30)
    index.close()


def test_what_comes_after_the_end_is_dropped_and_nobody_waits_for_it() -> None:
    memory = Memory()
    index, counters = _semantic(memory)
    index.close()
    index.add(_record("late"), "text")
    index.remove("late")
    assert index.flush(0)
    assert counters == {"dense_insert_closed": 1, "dense_remove_closed": 1}
    assert memory.held == {}
