"""The disk tier: restarts, killed writers, full disks, damaged and foreign files."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_mm.errors import KVUnavailableError, StoreError
from kvshare_mm.node import Node
from kvshare_mm.store import disk
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.codec import TEMP_SUFFIX, read_node
from kvshare_mm.store.disk import NODE_SUFFIX, DiskTier

BUDGET = 1 << 24


def node_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{NODE_SUFFIX}"))


def temp_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{TEMP_SUFFIX}"))


def file_size(tmp_path_factory, stored) -> int:
    tier = DiskTier(tmp_path_factory.mktemp("size"), BUDGET)
    tier.put(stored)
    return tier.num_bytes


def get_reason(tier: DiskTier, node_id: str) -> str:
    with pytest.raises(KVUnavailableError) as caught:
        tier.get(node_id)
    return caught.value.reason


def test_put_get_delete(tmp_path, make_stored, assert_same):
    tier = DiskTier(tmp_path / "new" / "folder", BUDGET)
    stored = make_stored("a", embedding=np.ones(3, np.float32))
    assert tier.put(stored) == []
    assert_same(tier.get("a"), stored)
    assert ("a" in tier, list(tier), len(tier)) == (True, ["a"], 1)
    assert [tier.num_bytes] == [path.stat().st_size for path in tier.folder.iterdir()]

    tier.delete("a")
    tier.delete("a")
    assert ("a" in tier, list(tier), len(tier), tier.num_bytes) == (False, [], 0, 0)
    assert list(tier.folder.iterdir()) == []
    assert get_reason(tier, "a") == "evicted"


@pytest.mark.parametrize("node_id", ["../../etc/passwd", "a/b", "", "x" * 5000, "\ud800", "A\0b"])
def test_any_node_id_stays_inside_the_folder(tmp_path, make_stored, assert_same, node_id):
    stored = make_stored("a")
    stored = StoredNode(Node(node_id, "ns", stored.node.align_keys, stored.node.own), stored.kv)
    DiskTier(tmp_path, BUDGET).put(stored)
    assert_same(DiskTier(tmp_path, BUDGET).get(node_id), stored)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_restart_finds_everything(tmp_path, make_stored, assert_same):
    nodes = {
        name: make_stored(name, dtype=torch.bfloat16, embedding=vector)
        for name, vector in (("a", None), ("b", np.array([1.5, 2], np.float32)))
    }
    before = DiskTier(tmp_path, BUDGET)
    for stored in nodes.values():
        before.put(stored)

    after = DiskTier(tmp_path, BUDGET)
    assert after.num_bytes == before.num_bytes
    assert after.num_corrupt == 0
    records = {node.node_id: (node, embedding) for node, embedding in after.records()}
    assert records.keys() == nodes.keys()
    for name, stored in nodes.items():
        assert_same(after.get(name), stored)
        assert_same(StoredNode(records[name][0], stored.kv, records[name][1]), stored)


def test_the_order_of_use_survives_a_restart(tmp_path, make_stored):
    tier = DiskTier(tmp_path, BUDGET)
    for name in "abc":
        tier.put(make_stored(name))
        # Files written within one tick of the file system's clock would have no order.
        os.utime(tier._path(name), (1000 + ord(name), 1000 + ord(name)))
    tier.get("a")
    assert list(DiskTier(tmp_path, BUDGET)) == ["b", "c", "a"]
    assert list(DiskTier(tmp_path, tier.num_bytes - 1)) == ["c", "a"]
    assert len(node_files(tmp_path)) == 2


def test_a_full_tier_evicts_files(tmp_path, tmp_path_factory, make_stored):
    size = file_size(tmp_path_factory, make_stored("a"))
    tier = DiskTier(tmp_path, 2 * size)
    assert [tier.put(make_stored(name)) for name in "ab"] == [[], []]
    tier.touch("a")
    assert tier.put(make_stored("c")) == ["b"]
    tier.pin("a", 1000)
    assert tier.put(make_stored("d")) == ["c"]
    assert sorted(tier) == ["a", "d"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == tier.num_bytes == 2 * size
    tier.unpin("a")
    assert tier.put(make_stored("e")) == ["a"]


def test_a_node_wider_than_the_tier_leaves_the_others(tmp_path, tmp_path_factory, make_stored):
    tier = DiskTier(tmp_path, file_size(tmp_path_factory, make_stored("a")))
    tier.put(make_stored("a"))
    # Its K and V alone would fit: only the file says that it does not.
    assert tier.put(make_stored("b", 9)) == ["b"]
    assert tier.put(make_stored("c", 1000)) == ["c"]
    assert list(tier) == ["a"]
    assert len(node_files(tmp_path)) == 1
    assert tier.put(make_stored("a", 1000)) == ["a"]
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_left_alone(tmp_path, make_stored):
    others = ["model.safetensors", "milvus.db", "x.tmp", "notes.kvnode.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"precious")
    tier = DiskTier(tmp_path, 0)
    tier.put(make_stored("a"))
    assert tier.num_corrupt == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_damaged_files_are_deleted_and_counted_at_opening(tmp_path, make_stored, caplog):
    tier = DiskTier(tmp_path, BUDGET)
    for name in "abcd":
        tier.put(make_stored(name))
    os.truncate(tier._path("a"), 100)
    tier._path("b").write_bytes(b"")
    os.replace(tier._path("c"), tmp_path / f"renamed{NODE_SUFFIX}")

    with caplog.at_level(logging.WARNING):
        after = DiskTier(tmp_path, BUDGET)
    assert list(after) == ["d"]
    assert after.num_corrupt == 3
    assert [path.name for path in tmp_path.iterdir()] == [after._path("d").name]
    assert len(caplog.records) == 3


def test_a_file_that_another_process_removed_is_evicted(tmp_path, make_stored):
    tier = DiskTier(tmp_path, BUDGET)
    tier.put(make_stored("a"))
    tier.put(make_stored("b"))
    DiskTier(tmp_path, BUDGET).delete("a")
    assert [node.node_id for node, _ in tier.records()] == ["b"]
    assert "a" not in tier
    DiskTier(tmp_path, BUDGET).delete("b")
    assert get_reason(tier, "b") == "evicted"
    assert (len(tier), tier.num_bytes, tier.num_corrupt) == (0, 0, 0)


def test_a_node_that_cannot_be_read_now_may_be_later(tmp_path, make_stored, assert_same):
    tier = DiskTier(tmp_path, BUDGET)
    stored = make_stored("a")
    tier.put(stored)
    path = tier._path("a")
    os.replace(path, tmp_path / "aside")
    path.mkdir()  # opening a folder as a file fails for every user, also for root
    assert get_reason(tier, "a") == "io_error"
    assert list(tier.records()) == []
    assert len(DiskTier(tmp_path, BUDGET)) == 0
    path.rmdir()
    os.replace(tmp_path / "aside", path)
    assert_same(tier.get("a"), stored)


def test_a_full_disk_is_an_io_error_and_leaves_everything_as_it_was(
    tmp_path, tmp_path_factory, make_stored, assert_same, full_disk
):
    old, wide = make_stored("a"), make_stored("b", 3000)
    tier = DiskTier(tmp_path, file_size(tmp_path_factory, wide))
    tier.put(old)
    before = tier.num_bytes
    with full_disk(50_000):
        for stored in (wide, make_stored("a", 3000)):
            with pytest.raises(KVUnavailableError, match="too large") as caught:
                tier.put(stored)
            assert caught.value.reason == "io_error"
    assert temp_files(tmp_path) == []
    assert (list(tier), tier.num_bytes) == (["a"], before)
    assert_same(tier.get("a"), old)
    # With room again it goes on, and only now evicts.
    assert tier.put(wide) == ["a"]


def test_a_folder_that_was_removed_is_made_again(tmp_path, make_stored, assert_same):
    tier = DiskTier(tmp_path / "deep" / "cache", BUDGET)
    for name in "abc":
        tier.put(make_stored(name))
    shutil.rmtree(tmp_path / "deep")
    stored = make_stored("b", 20)
    assert tier.put(stored) == ["a", "c"]  # they went with the folder
    assert (list(tier), tier.num_recreated) == (["b"], 1)
    assert tier.num_bytes == sum(path.stat().st_size for path in tier.folder.iterdir())
    assert_same(tier.get("b"), stored)
    assert stat.S_IMODE(tier.folder.stat().st_mode) == 0o700
    assert tier.put(make_stored("d")) == []


def test_a_folder_that_cannot_be_made_again_is_an_io_error(tmp_path, make_stored):
    tier = DiskTier(tmp_path / "cache", BUDGET)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(KVUnavailableError) as caught:
        tier.put(make_stored("a"))
    assert caught.value.reason == "io_error"
    assert (list(tier), tier.num_recreated) == ([], 0)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/self", "/proc/none"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, place):
    if place.startswith("/proc") and not Path("/proc/self").is_dir():
        pytest.skip("needs procfs: not even root may write there")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Give a folder"):
        DiskTier(tmp_path / place, BUDGET)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_who_could_not_read_a_file_does_not_remove_a_newer_one(
    tmp_path, make_stored, monkeypatch, how
):
    tier = DiskTier(tmp_path, 1 << 24)
    tier.put(make_stored("a"))
    [file] = node_files(tmp_path)
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])

    def read_then_written(path):
        try:
            return read_node(path)
        finally:
            monkeypatch.undo()
            tier.put(make_stored("a", exact_len=8))

    monkeypatch.setattr(disk, "read_node", read_then_written)
    with pytest.raises(KVUnavailableError):
        tier.get("a")
    assert tier.get("a").node.exact_len == 8


def test_what_went_with_a_removed_folder_is_told_though_the_next_write_fails(
    tmp_path, make_stored, monkeypatch
):
    folder = tmp_path / "kv"
    tier = DiskTier(folder, 1 << 24)
    for name in "ab":
        tier.put(make_stored(name))
    shutil.rmtree(folder)

    def failing(*_, **__):
        raise KVUnavailableError("io_error", "full")

    monkeypatch.setattr(disk, "write_node", failing)
    with pytest.raises(KVUnavailableError):
        tier.put(make_stored("c"))
    monkeypatch.undo()
    assert sorted(tier.put(make_stored("d"))) == ["a", "b"]
    assert tier.put(make_stored("e")) == []
