"""What is not a number is neither stored nor given back: it would spread to whoever reuses it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvshare_mm.errors import NotFiniteError
from kvshare_mm.store.base import NodeKV, StoredNode, check_finite
from kvshare_mm.store.codec import write_node

from .test_tiered import PATIENCE_S, reason_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BAD = (float("nan"), float("inf"), float("-inf"))


def spoiled(stored: StoredNode, where: str, value: float = float("nan")) -> StoredNode:
    """The node with one bad number in K, V, its attention or its embedding."""
    if where in ("k", "v"):
        tensor = getattr(stored.kv, where).clone()
        tensor[-1, -1, -1, -1] = value
        return replace(stored, kv=replace(stored.kv, **{where: tensor}))
    vector = np.zeros(4, np.float32)
    vector[2] = value
    if where == "embedding":
        return replace(stored, embedding=vector)
    return replace(stored, node=replace(stored.node, attention=vector))


PLACES = ("k", "v", "attention", "embedding")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", PLACES)
def test_it_is_refused_and_nothing_changes(open_store, make_stored, gone, tmp_path, where, value):
    store = open_store()
    with pytest.raises(NotFiniteError, match="node new") as caught:
        store.put(spoiled(make_stored("new"), where, value))
    assert isinstance(caught.value, ValueError)
    assert store.resident("new") is None
    assert store.ids() == []
    assert store.flush(PATIENCE_S)
    assert not list((tmp_path / "kv").iterdir())

    before = make_stored("a")
    store.put(before)
    with pytest.raises(NotFiniteError):
        store.put(spoiled(make_stored("a", 9), where, value))
    assert store.get("a", "ns") is before
    assert store.counters == {"not_finite": 2}
    assert gone == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD)
def test_it_is_seen_in_every_dtype(open_store, make_stored, dtype, value):
    store = open_store(disk_bytes=None)
    with pytest.raises(NotFiniteError):
        store.put(spoiled(make_stored("a", 999, dtype=dtype), "k", value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_numbers(open_store, make_stored, dtype):
    """Their sum is not, but nobody asked for it."""
    store = open_store(disk_bytes=None)
    stored = make_stored("a", 64, dtype=dtype)
    largest = torch.finfo(dtype).max
    kv = NodeKV(torch.full_like(stored.kv.k, largest), torch.full_like(stored.kv.v, -largest))
    store.put(replace(stored, kv=kv))
    assert store.counters == {}


def test_what_is_empty_is_stored(open_store, make_stored):
    store = open_store(disk_bytes=None)
    store.put(make_stored("a", v_dim=0))
    store.put(make_stored("b", own=()))
    assert store.ids() == ["a", "b"]


def test_a_vector_that_is_none_does_not_replace_a_good_one(open_store, make_stored):
    store = open_store()
    good = np.ones(3, np.float32)
    store.put(make_stored("a", embedding=good))
    with pytest.raises(NotFiniteError):
        store.update_embedding("a", np.array([1, np.nan, 1], np.float32))
    assert store.get("a", "ns").embedding is good
    assert store.counters == {"not_finite": 1}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_file_that_holds_it_is_deleted_when_it_is_read(
    open_store, make_stored, gone, where, value
):
    store = open_store()
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    [file] = store._disk.folder.iterdir()
    write_node(file, spoiled(make_stored("a"), where, value))  # an older version wrote it

    store = open_store()
    assert reason_of(store, "a") == "corrupt"
    assert gone == ["a"]
    assert store._disk.num_corrupt == 1
    assert not file.exists()
    assert reason_of(store, "a") == "evicted"
    assert store.counters == {"read_corrupt": 1, "read_evicted": 1}


@pytest.mark.parametrize("where", ["attention", "embedding"])
def test_a_record_that_holds_it_is_deleted_when_it_is_found(open_store, make_stored, where):
    store = open_store()
    store.put(make_stored("a"))
    store.put(make_stored("b"))
    assert store.flush(PATIENCE_S)
    file = store._disk._path("a")
    write_node(file, spoiled(make_stored("a"), where))

    opened = open_store()
    assert opened._disk.num_corrupt == 1
    assert [node.node_id for node, _ in opened.records()] == ["b"]
    assert not file.exists()

    write_node(opened._disk._path("b"), spoiled(make_stored("b"), where))  # after the opening
    assert list(opened.records()) == []
    assert opened._disk.num_corrupt == 2


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["k", "v"])
def test_it_is_seen_in_eight_bits(open_store, make_stored, where, value):
    store = open_store(disk_bytes=None)
    good = make_stored("a", 9)
    store.put(replace(good, kv=NodeKV.packed(good.kv.k, good.kv.v)))
    bad = spoiled(make_stored("b", 9), where, value)
    with pytest.raises(NotFiniteError):
        store.put(replace(bad, kv=NodeKV.packed(bad.kv.k, bad.kv.v)))
    assert store.ids() == ["a"]


def test_float8_that_is_no_number_is_refused(make_stored):
    stored = make_stored(dtype=torch.float8_e4m3fn)
    check_finite(stored.node, None, stored.kv)
    with pytest.raises(NotFiniteError, match="its V"):
        check_finite(stored.node, None, spoiled(stored, "v").kv)
