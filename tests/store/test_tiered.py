"""RAM over disk: where nodes are, how they move, and when they are gone."""

from __future__ import annotations

import errno
import threading

import pytest

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.store import codec
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier, ram_bytes
from kvshare_mm.store.tiered import TieredStore

PATIENCE_S = 60  # for what is bound to happen; no test waits so long unless it fails


def reason_of(store: TieredStore, node_id: str, namespace: str = "ns") -> str:
    with pytest.raises(KVUnavailableError) as caught:
        store.get(node_id, namespace)
    return caught.value.reason


def test_flushed_nodes_survive_a_restart(open_store, make_stored, assert_same):
    store = open_store()
    nodes = [make_stored(name) for name in "abc"]
    for stored in nodes:
        store.put(stored)
        assert store.get(stored.node.node_id, "ns") is stored
    assert store.flush(PATIENCE_S)

    again = open_store()
    assert {node.node_id for node, _ in again.records()} == set("abc")
    assert again.bytes_by_tier() == {"host": 0, "disk": store.bytes_by_tier()["disk"]}
    for stored in nodes:
        assert again.resident(stored.node.node_id) == "disk"
        promoted = again.get(stored.node.node_id, "ns")
        assert_same(promoted, stored)
        assert again.resident(stored.node.node_id) == "host"
        assert again.get(stored.node.node_id, "ns") is promoted
    assert again.bytes_by_tier()["host"] == sum(map(ram_bytes, nodes))


def test_closing_writes_what_is_queued(open_store, make_stored, gone):
    store = open_store(slow_disk=True)
    for name in "abc":
        store.put(make_stored(name))
    threading.Timer(0.05, store._disk.gate.set).start()
    store.close(PATIENCE_S)
    store.close(PATIENCE_S)
    assert sorted(DiskTier(store._disk.folder, 1 << 24)) == ["a", "b", "c"]

    store.put(make_stored("late"))
    assert store.resident("late") == "host"
    assert store.flush(PATIENCE_S)
    assert "late" not in store._disk
    assert gone == []


def test_without_disk_eviction_means_gone(open_store, make_stored, gone):
    store = open_store(host_bytes=2 * ram_bytes(make_stored("a")), disk_bytes=None)
    for name in "abc":
        store.put(make_stored(name))
    assert gone == ["a"]
    assert store.resident("a") is None
    assert reason_of(store, "a") == "evicted"
    assert store.bytes_by_tier() == {"host": 2 * ram_bytes(make_stored("a"))}
    assert list(store.records()) == []
    assert store.flush(0)
    assert gone == ["a"]


def test_with_disk_a_node_is_gone_when_both_have_let_it_go(open_store, make_stored, gone):
    size = ram_bytes(make_stored("a"))
    probe = open_store(folder=open_store()._disk.folder / "probe")
    probe.put(make_stored("a"))
    probe.flush(PATIENCE_S)
    store = open_store(host_bytes=size, disk_bytes=2 * probe.bytes_by_tier()["disk"])
    for name in "ab":
        store.put(make_stored(name))
        assert store.flush(PATIENCE_S)
    assert (store.resident("a"), store.resident("b"), list(gone)) == ("disk", "host", [])
    store.put(make_stored("c"))
    assert gone.wait_for("a")
    assert (store.resident("a"), store.resident("b")) == (None, "disk")
    assert reason_of(store, "a") == "evicted"
    assert gone == ["a"]


def test_a_node_is_checked_against_the_namespace_wherever_it_is(open_store, make_stored, gone):
    store = open_store()
    store.put(make_stored("a", namespace="tenant 1"))
    store.close(PATIENCE_S)
    again = open_store()
    for opened, tier in ((store, "host"), (again, "disk")):
        assert reason_of(opened, "a", "tenant 2") == "wrong_namespace"
        # Neither lost nor promoted by it.
        assert opened.resident("a") == tier
        assert opened.counters == {"read_wrong_namespace": 1}
        assert opened.get("a", "tenant 1").node.namespace == "tenant 1"
    assert gone == []


def test_nodes_wider_than_a_tier(open_store, make_stored, gone, assert_same):
    small, wide = make_stored("small", 1), make_stored("wide", 1000)
    # Too wide for RAM and for the queue's budget: it goes to disk and is served from there.
    store = open_store(host_bytes=ram_bytes(small), queued_bytes=0)
    store.put(small)
    assert store.flush(PATIENCE_S)
    store.put(wide)
    assert store.flush(PATIENCE_S)
    assert (store.resident("wide"), store.resident("small")) == ("disk", "host")
    assert_same(store.get("wide", "ns"), wide)
    assert (store.resident("wide"), store.resident("small")) == ("disk", "host")
    assert gone == []

    # Too wide for the disk: it stays in RAM.
    folder = store._disk.folder
    store = open_store(disk_bytes=ram_bytes(wide) // 2, folder=folder / "2")
    store.put(wide)
    assert not store.flush(PATIENCE_S)
    assert store.counters == {"write_too_large": 1}
    assert store.get("wide", "ns") is wide
    assert gone == []

    # Too wide for everything: it is gone, and nothing else is.
    store = open_store(ram_bytes(small), ram_bytes(wide) // 2, folder=folder / "3")
    store.put(small)
    assert store.flush(PATIENCE_S)
    store.put(wide)
    assert gone.wait_for("wide")
    assert (store.resident("wide"), store.resident("small")) == (None, "host")
    assert reason_of(store, "wide") == "evicted"
    assert gone == ["wide"]


def test_a_read_error_is_a_miss_and_the_node_stays(reopened, gone, monkeypatch):
    store = reopened("a")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(codec, "open", fail, raising=False)
        assert reason_of(store, "a") == "io_error"
    assert gone == []
    assert store.get("a", "ns").node.node_id == "a"


def test_deleted_is_deleted_everywhere(open_store, make_stored, gone):
    store = open_store()
    store.put(make_stored("a"))
    store.flush(PATIENCE_S)
    store.delete("a")
    store.delete("a")
    store.delete("unknown")
    assert gone == ["a"]
    assert store.resident("a") is None
    assert reason_of(store, "a") == "evicted"
    assert list(store._disk.folder.iterdir()) == []


def test_use_in_ram_keeps_a_node_on_disk(open_store, make_stored, gone):
    probe = open_store(folder=open_store()._disk.folder / "probe")
    probe.put(make_stored("a"))
    probe.flush(PATIENCE_S)
    store = open_store(disk_bytes=2 * probe.bytes_by_tier()["disk"])
    for name in "ab":
        store.put(make_stored(name))
        assert store.flush(PATIENCE_S)
    store.get("a", "ns")
    store.put(make_stored("c"))
    assert store.flush(PATIENCE_S)
    assert sorted(store._disk) == ["a", "c"]
    assert store.resident("b") == "host"
    assert gone == []


def test_pins_hold_in_every_tier(open_store, make_stored, gone):
    store = open_store(host_bytes=ram_bytes(make_stored("a")))
    store.put(make_stored("a"))
    assert store.flush(PATIENCE_S)
    store.pin("a", 1000)
    store.put(make_stored("b"))
    assert store.flush(PATIENCE_S)
    assert (store.resident("a"), store.resident("b")) == ("host", "disk")
    store.unpin("a")
    store.get("b", "ns")
    assert (store.resident("a"), store.resident("b")) == ("disk", "host")
    store.pin("a", 1000)
    assert not store._disk._ledger.can_fit("c", store._disk.max_bytes)
    store.unpin("a")
    assert store._disk._ledger.can_fit("c", store._disk.max_bytes)


def test_on_gone_is_called_without_locks_and_may_fail(make_stored, caplog):
    calls = []

    def on_gone(node_id: str) -> None:
        # From another thread, because a lock that is held may be reentrant.
        other = threading.Thread(target=lambda: calls.append((node_id, store.resident(node_id))))
        other.start()
        other.join(PATIENCE_S)
        raise RuntimeError("the tree fell")

    store = TieredStore(HostTier(ram_bytes(make_stored("a"))), None, on_gone)
    for name in "abc":
        store.put(make_stored(name))
    store.delete("c")
    assert calls == [("a", None), ("b", None), ("c", None)]
    assert sum("on_gone" in record.getMessage() for record in caplog.records) == 3
