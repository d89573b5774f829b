"""Inverted lists stay right while they are tidied beside, and nobody tidies who adds or removes."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.index import postings as module
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.lexical import LexicalIndex
from kvshare_mm.index.postings import Postings
from kvshare_mm.index.prefix import PrefixIndex


def record(node_id: str, tokens: Any, namespace: str = "ns") -> IndexRecord:
    return IndexRecord(node_id, namespace, np.asarray(tokens, dtype=np.uint64))


def contents(postings: Postings[int]) -> dict[str, tuple[int, set[int]]]:
    """What is alive, read out of the runs."""
    found: dict[str, tuple[int, set[int]]] = {}
    for slot, (node_id, value) in enumerate(zip(postings.ids, postings.values, strict=True)):
        if postings.alive[slot]:
            assert node_id not in found
            found[node_id] = value, set()
    for run in postings.runs:
        hashes = np.repeat(run.hashes, np.diff(run.starts))
        order = np.lexsort((run.slots, hashes))
        assert (order == np.arange(len(order))).all(), "runs are sorted"
        assert len(np.unique(run.hashes)) == len(run.hashes)
        for hash_, slot in zip(hashes.tolist(), run.slots.tolist(), strict=True):
            if postings.alive[slot]:
                found[postings.ids[slot]][1].add(hash_)
    return found


@settings(max_examples=60)
@given(st.data())
def test_any_history_reads_as_a_dict_does(data: st.DataObject) -> None:
    """With small bounds, so that much is merged and left out beside."""
    lock = threading.Lock()
    postings: Postings[int] = Postings(lock)
    model: dict[str, tuple[int, set[int]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", data.draw(st.sampled_from([0, 20])))
        patch.setattr(module, "_FEW", 1)
        patch.setattr(module, "_PIECE", data.draw(st.sampled_from([1, 7, 1 << 17])))
        for count in range(data.draw(st.integers(1, 40))):
            if model and data.draw(st.integers(0, 2)) == 0:
                gone = data.draw(st.sampled_from(sorted(model)))
                del model[gone]
                with lock:
                    postings.remove(gone)
            else:
                hashes = data.draw(st.sets(st.integers(0, 30), max_size=8))
                again = data.draw(st.booleans()) and f"n{count - 1}" not in model and count
                name = f"n{count - 1}" if again else f"n{count}"
                model[name] = count, hashes
                with lock:
                    postings.add([(name, count, np.array(sorted(hashes), np.uint64))])
            with lock:
                assert contents(postings) == model
                assert len(postings) == len(model)
        postings.settle()
        with lock:
            assert contents(postings) == model
            assert postings._unbalanced() is None and not postings._decayed


def test_what_takes_long_is_done_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds or removes merges a few postings at most."""
    mine = threading.get_ident()
    longest = 0
    beside = 0
    real = module.merged

    def watched(runs: Any) -> Any:
        nonlocal longest, beside
        size = sum(len(run.hashes) for run in runs)
        if threading.get_ident() == mine:
            longest = max(longest, size)
        else:
            beside = max(beside, size)
        return real(runs)

    monkeypatch.setattr(module, "merged", watched)
    rng = np.random.default_rng(0)
    index = LexicalIndex()
    for i in range(600):
        index.add([record(str(i), rng.integers(0, 40_000, 400))])
    for i in range(300):
        index.remove([str(i)])
    index.settle()
    assert beside > 100_000
    assert longest <= module._AT_ONCE
    prompt = rng.integers(0, 40_000, 400)
    index.add([record("last", prompt)])
    assert [c.node_id for c in index.search("ns", prompt.astype(np.uint64), 1)] == ["last"]


def test_tidying_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40_000, 400) for _ in range(300)]
    index = LexicalIndex()
    with monkeypatch.context() as patch:

        def broken(self: Any) -> None:
            raise MemoryError

        patch.setattr(Postings, "_merge", broken)
        for i, prompt in enumerate(prompts[:-1]):
            index.add([record(str(i), prompt)])
        index.settle()
    index.add([record("last", prompts[-1])])
    index.settle()
    for i in (0, 100, 200):
        assert index.search("ns", prompts[i].astype(np.uint64), 1)[0].node_id == str(i)


@pytest.mark.parametrize("make", [LexicalIndex, PrefixIndex])
def test_an_index_knows_its_size(make: Any) -> None:
    rng = np.random.default_rng(0)
    records = [record(f"{i:032x}", rng.integers(0, 40_000, 2000)) for i in range(400)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = make()
    for each in records:
        index.add([each])
    index.settle()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.7 * taken <= index.num_bytes <= 1.3 * taken


def test_prefixes_are_told_from_the_longest_down() -> None:
    index = PrefixIndex(2)
    chains = {
        "a": [1, 2],
        "b": [1, 2, 3, 4],
        "c": [1, 2, 3, 4, 5, 6],
        "d": [1, 2, 3, 4],
        "e": [9, 9],
    }
    index.add([record(name, tokens) for name, tokens in chains.items()])
    query = np.array([1, 2, 3, 4, 5, 6, 7, 8], dtype=np.uint64)
    assert list(index.descending("ns", query)) == [(6, ["c"]), (4, ["d", "b"]), (2, ["a"])]
    assert list(index.descending("other", query)) == []


def test_of_many_with_one_prefix_all_are_told_in_the_end() -> None:
    index = PrefixIndex(2)
    tokens = list(range(100))
    index.add([record(str(i), tokens) for i in range(200)])
    told = [
        node for _, nodes in index.descending("ns", np.array(tokens, np.uint64)) for node in nodes
    ]
    assert told == [str(i) for i in reversed(range(200))]
