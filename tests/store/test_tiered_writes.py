"""RAM over disk: the write queue, failing writes, and changes that meet a write."""

from __future__ import annotations

import logging
import random
import shutil
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import ram_bytes

from ..helpers import in_threads, until

PATIENCE_S = 60  # for what is bound to happen; no test waits so long unless it fails
VECTOR = np.array([1, 2, 3], np.float32)


def test_an_evicted_node_is_read_from_the_queue_until_it_is_on_disk(open_store, make_stored, gone):
    store = open_store(host_bytes=ram_bytes(make_stored("a")), slow_disk=True)
    nodes = [make_stored(name) for name in "abcd"]
    for stored in nodes:
        store.put(stored)
    assert list(store._host) == ["d"]
    for stored in nodes:
        assert store.resident(stored.node.node_id) == "host"
        assert store.get(stored.node.node_id, "ns") is stored
    assert not store.flush(0)
    store._disk.gate.set()
    assert store.flush(PATIENCE_S)
    assert [store.resident(name) for name in "abcd"] == ["disk", "disk", "disk", "host"]
    assert gone == []


def test_what_the_queue_has_no_room_for_is_gone(open_store, make_stored, gone, caplog):
    size = ram_bytes(make_stored("a"))
    store = open_store(size, queued_bytes=2 * size, slow_disk=True)
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    for name in "bcdef":
        store.put(make_stored(name))
    # a is being written, b waits, f is in RAM.
    assert gone == ["c", "d", "e"]
    assert store.counters == {"write_queue_full": 3}
    assert len(caplog.records) == 1
    store._disk.gate.set()
    assert not store.flush(PATIENCE_S)  # c, d and e did not get to disk; it tells once
    assert store.flush(PATIENCE_S)
    assert sorted(store._disk) == ["a", "b", "f"]
    assert gone == ["c", "d", "e"]


def test_what_is_being_written_is_not_dropped_for_room(open_store, make_stored, gone):
    size = ram_bytes(make_stored("a"))
    store = open_store(2 * size, queued_bytes=size, slow_disk=True)
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    store.pin("a", 1000)
    store.put(make_stored("b"))
    store.put(make_stored("c"))  # b has only the queue now
    store.unpin("a")
    store.put(make_stored("d"))  # and so has a, beyond the queue's budget
    assert [store.resident(name) for name in "abcd"] == ["host"] * 4
    store._disk.gate.set()
    assert store.flush(PATIENCE_S)
    assert sorted(store._disk) == ["a", "b", "c", "d"]
    assert (gone, store.counters) == ([], {})


def test_a_disk_that_fails_costs_durability_only(open_store, make_stored, gone, caplog):
    store = open_store(slow_disk=True)
    store._disk.error = KVUnavailableError("io_error", "cannot write: disk on fire")
    store._disk.gate.set()
    with caplog.at_level(logging.WARNING):
        for name in "abc":
            store.put(make_stored(name))
        assert not store.flush(PATIENCE_S)
    assert store.counters == {"write_io_error": 3}
    assert sum("disk on fire" in record.getMessage() for record in caplog.records) == 1
    assert [store.get(name, "ns").node.node_id for name in "abc"] == ["a", "b", "c"]
    assert gone == []

    store._disk.error = None
    store.put(make_stored("d"))
    assert store.flush(PATIENCE_S)
    assert list(store._disk) == ["d"]


def test_a_really_full_disk(open_store, make_stored, full_disk, gone):
    wide = make_stored("wide", 3000)
    store = open_store(host_bytes=ram_bytes(wide))
    with full_disk(50_000):
        store.put(wide)
        store.flush(PATIENCE_S)
    assert store.counters == {"write_io_error": 1}
    assert store.get("wide", "ns") is wide
    assert list(store._disk.folder.iterdir()) == []
    # It was never written: when RAM lets it go it is gone.
    store.put(make_stored("next"))
    assert gone.wait_for("wide")
    assert store.resident("wide") is None


def test_a_removed_folder_is_made_again_and_counted(open_store, make_stored, gone, tmp_path):
    store = open_store(host_bytes=ram_bytes(make_stored("a")))
    for name in "ab":
        store.put(make_stored(name))
    assert store.flush(PATIENCE_S)
    shutil.rmtree(tmp_path / "kv")
    store.put(make_stored("c"))
    assert store.flush(PATIENCE_S)
    assert store.counters == {"folder_recreated": 1}
    assert gone.wait_for("a", "b")
    assert store.resident("c") == "host"
    assert list(DiskTier(tmp_path / "kv", 1 << 24)) == ["c"]


def test_the_writer_outlives_a_bug(open_store, make_stored, gone):
    store = open_store()
    wrong = replace(make_stored("wrong"), kv=make_stored("x", 3).kv)
    store.put(wrong)
    store.put(make_stored("right"))
    store.flush(PATIENCE_S)
    assert store.counters == {"write_internal": 1}
    assert list(store._disk) == ["right"]
    assert store.get("wrong", "ns") is wrong
    assert gone == []


def test_an_embedding_computed_later_is_durable(open_store, make_stored, assert_same):
    store = open_store()
    store.put(make_stored("in RAM and on disk"))
    assert store.flush(PATIENCE_S)
    assert store.update_embedding("in RAM and on disk", VECTOR)
    assert store.get("in RAM and on disk", "ns").embedding is VECTOR
    assert not store.update_embedding("unknown", VECTOR)
    store.close(PATIENCE_S)

    store = open_store()
    assert store.update_embedding("in RAM and on disk", 2 * VECTOR)  # on disk only, by now
    store.close(PATIENCE_S)
    want = replace(make_stored("in RAM and on disk"), embedding=2 * VECTOR)
    again = open_store()
    assert_same(again.get("in RAM and on disk", "ns"), want)
    (record,) = again.records()
    assert record[1].tolist() == [2, 4, 6]


def test_an_embedding_for_a_queued_node_saves_the_first_write(open_store, make_stored):
    store = open_store(slow_disk=True)
    writes = []
    disk_put = store._disk.put
    store._disk.put = lambda stored: (writes.append(stored), disk_put(stored))[1]
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    store.put(make_stored("b"))
    assert store.update_embedding("b", VECTOR)
    assert store.update_embedding("a", VECTOR)  # too late for the write that has begun
    store._disk.gate.set()
    assert store.flush(PATIENCE_S)
    assert Counter(stored.node.node_id for stored in writes) == {"a": 2, "b": 1}
    assert all(vector is not None for _, vector in store.records())


def test_a_new_version_put_during_a_write_is_the_one_that_stays(open_store, make_stored):
    store = open_store(slow_disk=True)
    store.put(make_stored("a", 8))
    assert store._disk.started.wait(PATIENCE_S)
    store.put(make_stored("a", 9))
    store._disk.gate.set()
    assert store.flush(PATIENCE_S)
    assert len(open_store().get("a", "ns").node) == 9


@pytest.mark.parametrize("error", [KVUnavailableError("io_error", "no"), MemoryError("no room")])
def test_a_new_version_that_cannot_be_written_is_not_replaced_by_the_old_one(
    open_store, make_stored, gone, error
):
    """The old one may be approximate where the tree says that the node is exact."""
    store = open_store(host_bytes=ram_bytes(make_stored("a")), slow_disk=True)
    store._disk.gate.set()
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    store._disk.error = error
    store.put(make_stored("a", exact_len=8))
    store.flush(PATIENCE_S)
    store.put(make_stored("b"))  # it leaves RAM
    store.flush(PATIENCE_S)
    with pytest.raises(KVUnavailableError, match="a"):
        store.get("a", "ns")


def test_an_embedding_that_came_meanwhile_stays_with_a_new_version(open_store, make_stored):
    store = open_store()
    store.put(make_stored("a"), "borrowed")
    assert store.update_embedding("a", VECTOR)
    store.put(make_stored("a", exact_len=8))
    found = store.get("a", "ns")
    assert found.node.exact_len == 8
    assert np.array_equal(found.embedding, VECTOR)


@pytest.mark.parametrize("lasting", ["now", "borrowed", "never"])
def test_what_was_put_again_after_a_deletion_is_written(open_store, make_stored, lasting):
    store = open_store(slow_disk=True)
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    store.delete("a")
    store.put(make_stored("a", exact_len=8), lasting)
    store._disk.gate.set()
    assert store.flush(PATIENCE_S)
    assert store._disk.get("a").node.exact_len == 8


@pytest.mark.parametrize("change", ["get", "update_embedding"])
def test_what_was_read_before_a_newer_version_does_not_take_its_place(
    open_store, make_stored, monkeypatch, change
):
    old = make_stored("a")
    new = replace(old, node=replace(old.node, exact_len=8))
    store = open_store(host_bytes=ram_bytes(new))
    store.put(old)
    store.put(make_stored("z"))  # a leaves RAM
    assert store.flush(PATIENCE_S)
    read = store._from_disk

    def read_then_others(node_id):
        found = read(node_id)
        monkeypatch.undo()
        store.put(new)
        store.put(make_stored("z"))
        assert store.flush(PATIENCE_S)
        return found

    monkeypatch.setattr(store, "_from_disk", read_then_others)
    if change == "get":
        store.get("a", "ns")
    else:
        assert store.update_embedding("a", VECTOR)
    assert store.flush(PATIENCE_S)
    assert store.get("a", "ns").node.exact_len == 8


def test_a_flush_does_not_wait_for_what_is_put_meanwhile(open_store, make_stored):
    store = open_store(slow_disk=True)
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    flushed: list[bool] = []
    flushing = threading.Thread(target=lambda: flushed.append(store.flush(PATIENCE_S)))
    flushing.start()
    until(lambda: bool(store._changed._waiters))
    put = store._disk.put

    def put_more(stored):
        dropped = put(stored)
        store.put(make_stored(f"{stored.node.node_id}+"))  # it never gets empty
        return dropped

    store._disk.put = put_more
    store.put(make_stored("b"))
    store._disk.gate.set()
    flushing.join(PATIENCE_S)
    assert flushed == [True]
    store._disk.put = put


def test_a_node_deleted_while_it_is_written_does_not_come_back(open_store, make_stored, gone):
    store = open_store(slow_disk=True)
    store.put(make_stored("a"))
    store.put(make_stored("b"))
    assert store._disk.started.wait(PATIENCE_S)
    store.delete("b")  # still queued
    deleting = threading.Thread(target=store.delete, args=("a",))
    deleting.start()
    store._disk.gate.set()
    deleting.join(PATIENCE_S)
    assert not deleting.is_alive()
    assert store.flush(PATIENCE_S)
    assert [store.resident("a"), store.resident("b")] == [None, None]
    assert gone == ["b", "a"]
    assert list(store._disk.folder.iterdir()) == []


@pytest.mark.parametrize(
    "read",
    [lambda store: store.get("a", "ns"), lambda store: store.update_embedding("a", VECTOR)],
    ids=["get", "embed"],
)
def test_a_read_that_a_delete_overtakes_does_not_bring_the_node_back(
    reopened, gone, monkeypatch, read
):
    store = reopened("a")
    disk_get = store._disk.get

    def get_then_deleted(node_id: str) -> StoredNode:
        stored = disk_get(node_id)
        store.delete(node_id)
        return stored

    monkeypatch.setattr(store._disk, "get", get_then_deleted)
    assert read(store) is not None
    assert store.resident("a") is None
    store.close(PATIENCE_S)
    assert list(store._disk.folder.iterdir()) == []
    assert gone == ["a"]


def test_an_embedding_goes_to_the_newest_version(reopened, make_stored, monkeypatch):
    store = reopened("a", num_tokens=8)
    disk_get = store._disk.get

    def get_then_put_again(node_id: str) -> StoredNode:
        stored = disk_get(node_id)
        store.put(make_stored("a", 9))
        return stored

    monkeypatch.setattr(store._disk, "get", get_then_put_again)
    assert store.update_embedding("a", VECTOR)
    assert len(store.get("a", "ns").node) == 9
    assert store.get("a", "ns").embedding is VECTOR


def test_threads(open_store, make_stored, assert_same, gone):
    """Whatever happens at once: reads are right, and each node that is gone is said so once."""
    num_threads, per_thread = 4, 40
    nodes = {
        f"{thread}-{i}": make_stored(f"{thread}-{i}", 20 + i % 7)
        for thread in range(num_threads)
        for i in range(per_thread)
    }
    size = max(map(ram_bytes, nodes.values()))
    store = open_store(host_bytes=6 * size, disk_bytes=30 * size, queued_bytes=4 * size)
    put: list[str] = []

    def work(thread: int) -> None:
        rng = random.Random(thread)
        for i in range(per_thread):
            put.append(f"{thread}-{i}")
            store.put(nodes[f"{thread}-{i}"])
            for _ in range(4):
                node_id = rng.choice(put)
                action = rng.choice(["get", "get", "get", "embed", "pin", "delete"])
                if action == "embed":
                    store.update_embedding(node_id, VECTOR)
                elif action == "pin":
                    store.pin(node_id, 0.001)
                elif action == "delete" and rng.random() < 0.2:
                    store.delete(node_id)
                else:
                    try:
                        got = store.get(node_id, "ns")
                        assert_same(replace(got, embedding=None), nodes[node_id])
                    except KVUnavailableError as error:
                        assert error.reason == "evicted"

    in_threads(work, range(num_threads))
    store.close(PATIENCE_S)

    there = {node_id for node_id in nodes if store.resident(node_id) is not None}
    assert Counter(gone) == Counter(nodes.keys() - there)
    assert 0 < len(there) < len(nodes)
    assert there == {*store._host, *store._disk}
    for node_id in there:
        assert_same(replace(store.get(node_id, "ns"), embedding=None), nodes[node_id])
    assert store._disk.num_corrupt == 0
    assert sorted(DiskTier(store._disk.folder, 1 << 24)) == sorted(store._disk)


def test_two_that_wait_for_a_write_that_fails_are_both_told(open_store, make_stored):
    store = open_store(slow_disk=True)
    store._disk.error = KVUnavailableError("io_error", "full")
    store.put(make_stored("a"))
    flushed: list[bool] = []
    waiting = [
        threading.Thread(target=lambda: flushed.append(store.flush(PATIENCE_S))) for _ in range(2)
    ]
    for thread in waiting:
        thread.start()
    until(lambda: len(store._changed._waiters) == 2)
    store._disk.gate.set()
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert flushed == [False, False]
    assert store.flush(PATIENCE_S)


@pytest.mark.parametrize("change", ["get", "update_embedding"])
def test_a_deleted_node_whose_write_has_just_ended_stays_deleted(
    open_store, make_stored, gone, change
):
    """Its file is there until the writer looks again."""
    store = open_store(slow_disk=True)
    put, seen = store._disk.put, []

    def put_then_asked(stored):
        dropped = put(stored)
        seen.extend(["a" in store._disk, store.resident("a")])
        if change == "update_embedding":
            seen.append(store.update_embedding("a", VECTOR))
        else:
            with pytest.raises(KVUnavailableError):
                store.get("a", "ns")
            seen.append(False)
        return dropped

    store._disk.put = put_then_asked
    store.put(make_stored("a"))
    assert store._disk.started.wait(PATIENCE_S)
    store.delete("a")
    store._disk.gate.set()
    assert store.flush(PATIENCE_S)
    assert seen == [True, None, False]
    assert store.ids() == [] and list(store._disk) == [] and gone == ["a"]
    assert list(store._disk.folder.iterdir()) == []


def test_what_is_put_after_a_deletion_is_newer_than_what_was_read_before(
    reopened, make_stored, monkeypatch
):
    store = reopened("a")
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    store._host.delete("a")
    disk_get = store._disk.get

    def get_then_others(node_id):
        found = disk_get(node_id)
        monkeypatch.undo()
        store.delete("a")
        store.put(make_stored("a", exact_len=8))
        assert store.flush(PATIENCE_S)
        store._host.delete("a")
        return found

    monkeypatch.setattr(store._disk, "get", get_then_others)
    store.get("a", "ns")
    assert store.get("a", "ns").node.exact_len == 8


def test_a_node_that_is_damaged_is_gone_for_who_embeds_it_too(reopened, gone):
    store = reopened("a")
    [file] = store._disk.folder.glob("*.kvnode")
    file.write_bytes(file.read_bytes()[:-3])
    assert not store.update_embedding("a", VECTOR)
    assert gone == ["a"] and store.ids() == []
    assert store.counters == {"read_corrupt": 1}
