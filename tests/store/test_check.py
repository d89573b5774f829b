"""`kvshare store`: whatever is wrong in a folder is found, and only that is removed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kvshare_mm.errors import KVUnavailableError, StoreError
from kvshare_mm.node import Piece
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.reuse.check import num_bytes, repair, verify
from kvshare_mm.reuse.donors import _parents_first
from kvshare_mm.store import codec
from kvshare_mm.store.disk import DiskTier, node_file

BUDGET = 1 << 24


@pytest.fixture
def store(tmp_path: Path, make_stored) -> Path:
    """A donor, one that borrows from it and from one that is gone, and what audits taught."""
    disk = DiskTier(tmp_path / "kv", BUDGET)
    disk.put(make_stored("a", 8))
    pieces = (Piece("a", 2, 0, 4), Piece("gone", 0, 4, 2))
    disk.put(make_stored("b", 8, own=((6, 8),), pieces=pieces, parent="a"))
    disk.close()
    known = Calibration(Counter(), tmp_path / "calibration-0123.json")
    known.observe("ns", "a", observed=0.5, bound=0.01, asked=0.01)
    known.save()
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def test_a_whole_folder(store):
    before = files(store)
    report = verify(store)
    assert report.ok
    assert (report.donors, report.tokens_owned, report.tokens_readable) == (2, 10, 14)
    assert (report.donors_missing_some, report.tokens_missing) == (1, 2)
    assert report.bytes["nodes"] == sum(len(c) for n, c in before.items() if "kvnode" in n)
    assert repair(store).ok
    assert files(store) == before


def damaged(store: Path, make_stored) -> str:
    path = store / "kv" / node_file("a")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    return f"kv/{path.name}"


def garbage(store: Path, make_stored) -> str:
    path = store / "kv" / node_file("x")
    path.write_bytes(bytes(range(256)) * 9)
    return f"kv/{path.name}"


def renamed(store: Path, make_stored) -> str:
    shutil.copy(store / "kv" / node_file("a"), store / "kv" / node_file("x"))
    return f"kv/{node_file('x')}"


def not_a_number(store: Path, make_stored) -> str:
    stored = make_stored("n")
    stored.kv.v[:] = float("nan")
    codec.write_node(store / "kv" / node_file("n"), stored)
    return f"kv/{node_file('n')}"


def borrowing(owner: str, start: int, namespace: str = "ns"):
    def wrong(store: Path, make_stored) -> str:
        piece = Piece(owner, start, 0, 4)
        stored = make_stored("w", 8, own=((4, 8),), pieces=(piece,), namespace=namespace)
        codec.write_node(store / "kv" / node_file("w"), stored)
        return f"kv/{node_file('w')}"

    return wrong


def left(name: str):
    def temporary(store: Path, make_stored) -> str:
        (store / name).write_bytes(b"half of")
        return name

    return temporary


def calibration(store: Path, make_stored) -> str:
    path = store / "calibration-0123.json"
    path.write_text(path.read_text().replace('"misses":1', '"misses":0'))
    return path.name


def of_format(version: int):
    def other(store: Path, make_stored) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "FORMAT_VERSION", str(version))
            codec.write_node(store / "kv" / node_file("v"), make_stored("v", 100))
        return f"kv/{node_file('v')}"

    return other


NOW = int(codec.FORMAT_VERSION)
WRONG = [
    (damaged, "damaged", 8),
    (garbage, "damaged", None),
    (renamed, "damaged", 8),
    (not_a_number, "damaged", 8),
    (borrowing("a", 6), "wrong_borrowing", 4),
    (borrowing("a", 0, "tenant"), "wrong_borrowing", 4),
    (left("kv/x.kvnode.0f.tmp"), "temporary", 0),
    (left("calibration-0123.json.7.tmp"), "temporary", 0),
    (left("calibration-0123.json.unreadable"), "set_aside", None),
    (calibration, "damaged", None),
    (of_format(NOW - 1), "older_format", None),
    (of_format(NOW + 1), "newer_format", None),
]


@pytest.mark.parametrize(("wrong", "kind", "tokens"), WRONG)
@pytest.mark.parametrize("aside", [False, True])
def test_what_is_wrong_is_named_and_nothing_else_goes(
    store, make_stored, tmp_path_factory, wrong, kind, tokens, aside
):
    name = wrong(store, make_stored)
    before = files(store)
    report = verify(store)
    assert files(store) == before
    [problem] = report.problems
    found = str(problem.path.relative_to(store)), problem.kind, problem.tokens
    assert found == (name, kind, tokens)
    assert not json.loads(json.dumps(report.as_json()))["ok"]

    moved = tmp_path_factory.mktemp("aside")
    repair(store, moved if aside else None)
    gone = {name: before.pop(name)} if kind != "newer_format" else {}
    assert files(store) == before
    assert files(moved) == (gone if aside else {})
    assert verify(store).ok == (kind != "newer_format")


def test_nothing_is_set_aside_in_the_place_where_it_was(store, make_stored, monkeypatch):
    damaged(store, make_stored)
    before = files(store)
    monkeypatch.chdir(store)
    for folder, aside in ((store, store), (store, Path("kv/..")), (Path(), store)):
        with pytest.raises(StoreError, match="the store folder itself"):
            repair(folder, aside)
    assert files(store) == before


def test_what_was_set_aside_before_stays(store, make_stored, tmp_path_factory):
    moved = tmp_path_factory.mktemp("aside")
    contents = []
    for end in (b"\x01", b"\x02", b"\x03"):
        name = damaged(store, make_stored)
        contents.append((store / name).read_bytes() + end)
        (store / name).write_bytes(contents[-1])
        assert not repair(store, moved).ok
        DiskTier(store / "kv", BUDGET).put(make_stored("a", 8))
    assert verify(store).ok
    assert files(moved) == dict(zip((name, f"{name}.2", f"{name}.3"), contents, strict=True))


def test_what_the_disk_does_not_give_stays(store, monkeypatch):
    before = files(store)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(codec, "open", fail, raising=False)
    assert [(p.kind, p.broken) for p in repair(store).problems] == [("unreadable", False)] * 2
    assert files(store) == before


def test_a_folder_in_use_is_read_and_not_repaired(store):
    disk = DiskTier(store / "kv", BUDGET)
    other = DiskTier(store / "kv", BUDGET)
    (store / "kv" / "x.kvnode.0f.tmp").write_bytes(b"what a server writes now")
    report = verify(store)
    assert (report.ok, report.in_use) == (True, True)
    disk.close()
    with pytest.raises(StoreError, match="a server uses"):
        repair(store)
    other.close()
    assert [p.kind for p in repair(store).problems] == ["temporary"]


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        (f"kv/{node_file('a')}", 0),
        (f"kv/{node_file('a')}", 1),
        (f"kv/{node_file('w')}", 2),
        ("calibration-0123.json", 0),
        ("calibration-9.json", 1),
        ("milvus-x.db/wal-2", 0),
    ],
)
def test_a_file_that_a_server_takes_away_while_we_look_is_no_failure(
    store, make_stored, monkeypatch, name, looks
):
    """It goes when it was looked at so many times."""
    borrowing("a", 6)(store, make_stored)
    (store / "calibration-9.json").write_text("{}")
    (store / "milvus-x.db").mkdir()
    for file in ("wal-1", "wal-2"):
        (store / "milvus-x.db" / file).write_bytes(b"four")
    left, stat = [looks], Path.stat

    def stat_late(path, **options):
        if path == store / name:
            left[0] -= 1
            if left[0] < 0:
                path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_late)
    num_bytes(store)
    report = verify(store)
    assert not os.path.exists(store / name)
    assert {problem.kind for problem in report.problems} <= {"damaged", "wrong_borrowing"}
    assert report.bytes["index"] == (4 if "milvus" in name else 8)


def test_a_folder_that_milvus_takes_away_while_we_look_is_no_failure(store, monkeypatch):
    segment = store / "milvus-x.db" / "segment"
    segment.mkdir(parents=True)
    (store / "milvus-x.db" / "wal").write_bytes(b"four")
    scandir = os.scandir

    def scandir_late(path):
        if os.fspath(path) == str(segment):
            segment.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_late)
    assert verify(store).bytes["index"] == 4
    assert not segment.exists()


def test_no_server_starts_on_a_folder_that_is_being_repaired(store, monkeypatch):
    monkeypatch.setattr("kvshare_mm.store.lock._PAUSE_S", 0.0)

    def start(_: int) -> None:
        with pytest.raises(StoreError, match="is being repaired"):
            DiskTier(store / "kv", BUDGET)

    repair(store, read=start)
    assert len(DiskTier(store / "kv", BUDGET)) == 2


@pytest.mark.parametrize("name", ["", "kv", "none"])
def test_other_folders_are_refused(tmp_path, name):
    (tmp_path / "kv").mkdir()
    folder = tmp_path / name if name else tmp_path / "kv" / "x"
    with pytest.raises(StoreError, match="not a store folder"):
        verify(folder)


def test_a_family_is_the_same_after_a_restart_with_a_clock_that_went_back(make_stored):
    line = [
        (replace(make_stored(name, parent=parent).node, created_s=created_s), None)
        for name, parent, created_s in (
            ("grandchild", "child", 1.0),
            ("other", None, 1.5),
            ("root", None, 3.0),
            ("child", "root", 2.0),
        )
    ]
    restored = [node.node_id for node, _ in _parents_first(line)]
    assert restored == ["root", "child", "grandchild", "other"]


def test_a_later_version_s_nodes_stay_unused_and_take_their_room(store, make_stored, caplog):
    name = of_format(NOW + 1)(store, make_stored)
    taken = (store / name).stat().st_size
    disk = DiskTier(store / "kv", taken + 10)
    assert (store / name).exists()
    assert list(disk) == []
    assert disk.left_alone == {"newer_format": 1}
    assert "newer format" in caplog.text
    # Written there by another process after the opening: not read, and not deleted.
    disk = DiskTier(store / "kv", BUDGET)
    disk.put(make_stored("v"))
    of_format(NOW + 1)(store, make_stored)
    with pytest.raises(KVUnavailableError) as caught:
        disk.get("v")
    assert caught.value.reason == "newer_format"
    assert "v" not in disk
    assert (store / name).exists()
