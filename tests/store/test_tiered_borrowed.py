"""RAM over disk: owners get to disk with those that borrow from them."""

from __future__ import annotations

import shutil

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.node import Piece
from kvshare_mm.store import disk

PATIENCE_S = 60  # for what is bound to happen; no test waits so long unless it fails


def borrower(make_stored, name, *owners):
    pieces = tuple(Piece(owner, 0, 2 * i, 2) for i, owner in enumerate(owners))
    return make_stored(name, own=((2 * len(owners), 8),), pieces=pieces)


def test_who_did_not_get_to_disk_is_written_with_a_borrower(open_store, make_stored):
    store = open_store(slow_disk=True)
    store._disk.gate.set()
    store._disk.error = KVUnavailableError("io_error", "full, for a moment")
    store.put(make_stored("a"))
    assert not store.flush(PATIENCE_S)
    store._disk.error = None
    store.put(borrower(make_stored, "b", "a"))
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["a", "b"]


def test_who_the_disk_gave_up_is_written_with_a_borrower(open_store, make_stored, tmp_path):
    store = open_store()
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    shutil.rmtree(tmp_path / "kv")
    store.put(make_stored("x"))
    store.put(borrower(make_stored, "b", "a"))
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["a", "b", "x"]


def test_what_is_kept_elsewhere_goes_to_disk_only_over_an_older_version(open_store, make_stored):
    store = open_store()
    store.put(make_stored("a"), "never")
    store.put(borrower(make_stored, "b", "a"))
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["b"]
    store.put(make_stored("b", exact_len=8), "never")
    assert store.flush(PATIENCE_S)
    assert store._disk.get("b").node.exact_len == 8


def test_who_is_borrowed_from_gets_to_disk_with_the_borrower(open_store, make_stored):
    """Else the borrower would be full of holes after a kill, though it was flushed."""
    store = open_store()
    for name in "xy":
        store.put(make_stored(name), "borrowed")
    store.put(borrower(make_stored, "z", "x"), "borrowed")
    assert store.flush(PATIENCE_S) and sorted(store._disk) == []
    store.put(borrower(make_stored, "a", "z", "gone"))
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["a", "x", "z"]
    store.put(borrower(make_stored, "b", "y"))
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["a", "b", "x", "y", "z"]
    store.put(make_stored("x", exact_len=8), "borrowed")  # more of it than is on disk
    store.put(borrower(make_stored, "c", "x"))
    assert store.flush(PATIENCE_S)
    assert store._disk.get("x").node.exact_len == 8


def test_what_the_disk_has_no_room_for_is_not_written_with_every_borrower(
    open_store, make_stored, tmp_path
):
    """RAM has it still; both would push each other out for ever."""
    alone = open_store(folder=tmp_path / "measured")
    alone.put(make_stored("a"))
    assert alone.flush(PATIENCE_S)
    store = open_store(disk_bytes=3 * alone._disk.num_bytes)
    writes = []
    put = store._disk.put
    store._disk.put = lambda stored: (writes.append(stored.node.node_id), put(stored))[1]
    names = [f"n{i:02}" for i in range(12)]
    for number, name in enumerate(names):
        owners = names[max(0, number - 3) : number]
        store.put(borrower(make_stored, name, *owners))
        assert store.flush(PATIENCE_S)
    assert writes == names
    assert len(store._disk) < len(names)


def test_a_prompt_that_somebody_else_was_answered_for_gets_to_disk(open_store, make_stored):
    """Its twin is over and was flushed, though its own answer goes on."""
    store = open_store()
    store.put(make_stored("a"), "borrowed")
    store.touch("a")
    store.touch("unknown")
    assert store.flush(PATIENCE_S) and list(store._disk) == ["a"]


def test_what_a_removed_folder_took_is_written_with_a_borrower_whatever_fails_between(
    open_store, make_stored, tmp_path
):
    store = open_store(slow_disk=True)
    store._disk.gate.set()
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    shutil.rmtree(tmp_path / "kv")
    write = disk.write_node

    def failing(*_, **__):
        raise KVUnavailableError("io_error", "full, for a moment")

    disk.write_node = failing
    try:
        store.put(make_stored("c"))
        assert not store.flush(PATIENCE_S)
    finally:
        disk.write_node = write
    large = make_stored("large", 60_000, layers=10)
    assert large.kv.num_bytes > store._disk.max_bytes
    store.put(large)
    assert not store.flush(PATIENCE_S)
    store.put(borrower(make_stored, "e", "a"))
    assert store.flush(PATIENCE_S) and {"a", "e"} <= set(store._disk)
