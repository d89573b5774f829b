"""The prefix index finds the longest block-aligned common prefix, newest nodes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.prefix import PrefixIndex


def record(node_id: str, tokens: list[int], namespace: str = "ns") -> IndexRecord:
    return IndexRecord(node_id, namespace, np.array(tokens, dtype=np.uint64))


def keys(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.uint64)


def common_blocks(a: list[int], b: list[int], block: int) -> int:
    shared = [x == y for x, y in zip(a, b, strict=False)]
    return [*shared, False].index(False) // block


prompts = st.lists(st.integers(0, 1), max_size=12)


@given(
    stored=st.lists(prompts, max_size=10),
    removed=st.sets(st.integers(0, 9)),
    query=prompts,
    block=st.integers(1, 4),
    limit=st.integers(0, 5),
)
def test_agrees_with_brute_force(
    stored: list[list[int]], removed: set[int], query: list[int], block: int, limit: int
) -> None:
    index = PrefixIndex(block)
    index.add([record(str(i), tokens) for i, tokens in enumerate(stored)])
    index.remove([str(i) for i in removed])
    shared = {
        i: common_blocks(tokens, query, block)
        for i, tokens in enumerate(stored)
        if i not in removed
    }
    best = max(shared.values(), default=0)
    expected = [str(i) for i in sorted(shared, reverse=True) if best and shared[i] == best]
    assert index.longest("ns", keys(query), limit) == expected[:limit]
    assert len(index) == len(shared)


def test_namespaces_never_leak() -> None:
    index = PrefixIndex(2)
    index.add([record("a", [1, 2, 3, 4], "one"), record("b", [1, 2], "two")])
    assert index.longest("two", keys([1, 2, 3, 4])) == ["b"]
    assert index.longest("three", keys([1, 2, 3, 4])) == []


def test_adding_again_replaces_and_makes_newest() -> None:
    index = PrefixIndex(2)
    index.add([record("a", [1, 2]), record("b", [1, 2])])
    index.add([record("a", [1, 2])])
    assert index.longest("ns", keys([1, 2])) == ["a", "b"]
    index.add([record("a", [7, 8])])
    assert index.longest("ns", keys([1, 2])) == ["b"]
    assert len(index) == 2


def test_removing_everything_frees_everything() -> None:
    index = PrefixIndex()
    index.add([record(str(i), list(range(100 + i))) for i in range(20)])
    index.remove([str(i) for i in range(20)])
    index.remove(["0", "unknown"])
    assert len(index) == 0
    assert index._namespaces == {}


def test_block_must_be_positive() -> None:
    with pytest.raises(ValueError, match="block"):
        PrefixIndex(0)
