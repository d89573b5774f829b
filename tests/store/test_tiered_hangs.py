"""RAM over disk: a disk that hangs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.store import tiered
from kvshare_mm.store.codec import write_node
from kvshare_mm.store.host import ram_bytes

from ..helpers import until

PATIENCE_S = 60  # for what is bound to happen; no test waits so long unless it fails
VECTOR = np.array([1, 2, 3], np.float32)


def test_a_disk_that_hangs_in_a_write_holds_up_nothing_that_ram_answers(
    open_store, make_stored, monkeypatch
):
    """Deleting, evicting with a full queue, and finding damage wait for no write."""
    size = ram_bytes(make_stored("a"))
    store = open_store(2 * size, queued_bytes=size)
    for name in ("old", "bad", "doomed"):
        store.put(make_stored(name))
        assert store.flush(PATIENCE_S)
    path = store._disk._path("bad")
    path.write_bytes(b"damaged")
    gate, started = threading.Event(), threading.Event()

    def hang(*args: object, **options: object) -> int:
        started.set()
        assert gate.wait(PATIENCE_S)
        return write_node(*args, **options)

    monkeypatch.setattr("kvshare_mm.store.disk.write_node", hang)

    def work() -> None:
        store.put(make_stored("a"))
        assert started.wait(PATIENCE_S)
        for name in ("old", "b", "c", "old", "d", "e", "f"):  # the queue has no room for all
            store.put(make_stored(name, exact_len=1))
        store.delete("doomed")
        if store.resident("bad") == "disk":
            with pytest.raises(KVUnavailableError):
                store.get("bad", "ns")
        assert store.get("f", "ns").node.node_id == "f"

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(PATIENCE_S / 2)
    waited = worker.is_alive()
    gate.set()
    worker.join(PATIENCE_S)
    assert not waited
    store.flush(PATIENCE_S)
    assert store.counters["write_queue_full"]
    assert not store._disk._path("doomed").exists()
    assert not path.exists()
    on_disk = sorted(p.name for p in store._disk.folder.iterdir())
    assert on_disk == sorted(store._disk._path(n).name for n in store._disk)
    assert store._disk.num_bytes == sum(p.stat().st_size for p in store._disk.folder.iterdir())


def test_a_disk_that_hangs_holds_up_no_deletion(open_store, make_stored, gone):
    store = open_store(slow_disk=True)
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    store.delete("a")
    assert gone == ["a"] and store.resident("a") is None
    assert not store.flush(0)
    store._disk.gate.set()
    assert store.flush(PATIENCE_S) and sorted(store._disk) == []
    store.put(make_stored("b"))
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["b"]


def test_a_disk_that_hangs_in_a_removal_holds_up_nothing_that_ram_answers(
    open_store, make_stored, monkeypatch
):
    store = open_store()
    for name in "ab":
        store.put(make_stored(name))
    assert store.flush(PATIENCE_S)
    hangs, go_on = threading.Event(), threading.Event()
    unlink = store._disk._unlink

    def hanging(path):
        hangs.set()
        assert go_on.wait(PATIENCE_S)
        unlink(path)

    monkeypatch.setattr(store._disk, "_unlink", hanging)
    deleting = threading.Thread(target=store.delete, args=("a",))
    deleting.start()
    assert hangs.wait(PATIENCE_S)
    try:
        assert store.resident("a") is None
        assert store.get("b", "ns").node.node_id == "b"
        store.put(make_stored("c"))
        assert store.resident("c") == "host"
        assert not store.flush(0.01), "a's file is still there"
    finally:
        go_on.set()
        deleting.join(PATIENCE_S)
    assert store.flush(PATIENCE_S) and sorted(store._disk) == ["b", "c"]


def test_a_disk_that_hangs_is_not_waited_for_at_the_end(open_store, make_stored, monkeypatch):
    monkeypatch.setattr(tiered, "_STALLED_S", 0.05)
    store = open_store(slow_disk=True)
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    store.close()
    assert store.get("a", "ns").node.node_id == "a"


def test_a_disk_that_writes_one_large_node_is_waited_for_at_the_end(
    open_store, make_stored, monkeypatch
):
    monkeypatch.setattr(tiered, "_STALLED_S", 0.01)
    monkeypatch.setattr(tiered, "_SLOWEST", 1e-3)  # bytes a second
    store = open_store(slow_disk=True)
    for name in "ab":
        store.put(make_stored(name))
    assert store._disk.started.wait(PATIENCE_S)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    store._disk.gate.set()
    closing.join(PATIENCE_S)
    assert sorted(store._disk) == ["a", "b"]


def test_a_flush_does_not_wait_for_a_write_that_came_later(open_store, make_stored):
    store = open_store()
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    with store._disk._changing:  # as while a file is written
        assert store.flush(0)
        store.delete("a")
        assert not store.flush(0), "its file is there"
        assert not store.flush(0.01)
    assert store.flush(0)
    assert list(store._disk.folder.iterdir()) == []


def test_a_flush_that_is_interrupted_leaves_what_failed_to_the_next(
    open_store, make_stored, monkeypatch
):
    store = open_store(slow_disk=True)
    store._disk.error = KVUnavailableError("io_error", "full")
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    wait_for = store._changed.wait_for

    def interrupted(*asked):
        if threading.current_thread() is store._writer:
            return wait_for(*asked)
        store._disk.gate.set()
        wait_for(lambda: not store._queue)
        raise KeyboardInterrupt

    monkeypatch.setattr(store._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.flush()
    monkeypatch.undo()
    assert not store.flush(float("inf"))
    assert store.flush(float("inf"))


def test_a_flush_that_is_interrupted_while_files_are_removed_leaves_what_failed_to_the_next(
    open_store, make_stored, monkeypatch
):
    store = open_store(slow_disk=True)
    store._disk.gate.set()
    store._disk.error = KVUnavailableError("io_error", "full")
    store.put(make_stored("a"))

    def interrupted(timeout_s):
        raise KeyboardInterrupt

    until(lambda: not store._queue)
    monkeypatch.setattr(store._disk, "clean", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.flush()
    monkeypatch.undo()
    assert not store.flush(PATIENCE_S)
    assert store.flush(PATIENCE_S)


def test_a_flush_does_not_wait_for_what_is_deleted_meanwhile(open_store, make_stored, monkeypatch):
    store = open_store()
    for name in "ab":
        store.put(make_stored(name))
    assert store.flush(PATIENCE_S)
    unlink, held = store._disk._unlink, store._disk._changing
    store._disk.forget("a")

    def unlink_and_more(path):
        unlink(path)
        monkeypatch.undo()
        store._disk.forget("b")  # by another thread, which then writes something
        threading.Thread(target=held.acquire).start()

    monkeypatch.setattr(store._disk, "_unlink", unlink_and_more)
    assert store.flush(PATIENCE_S)
    until(held.locked)
    held.release()
