"""Milvus Lite in a file: search, removal, persistence, reconciliation, failure."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvshare_mm.errors import ConfigError
from kvshare_mm.index import milvus_rows
from kvshare_mm.index.base import IndexRecord, IndexUnavailableError
from kvshare_mm.index.milvus import MilvusIndex

from ..collisions import twin_texts

DIM = 8


def record(number: int, namespace: str = "ns", *, embedded: bool = True) -> IndexRecord:
    """Records of consecutive numbers share half of their tokens and point in close directions."""
    keys = np.arange(number * 20, number * 20 + 40, dtype=np.uint64)
    angle = number / 10
    vector = np.zeros(DIM, dtype=np.float32)
    vector[:2] = np.cos(angle), np.sin(angle)
    return IndexRecord(f"node-{number}", namespace, keys, vector if embedded else None)


def embedding(number: int) -> np.ndarray:
    vector = record(number).embedding
    assert vector is not None
    return vector


Open = Callable[..., MilvusIndex]


@pytest.fixture
def open_index(tmp_path: Path) -> Iterator[Open]:
    """Opens indices, of one file unless told otherwise; closed after the test."""
    opened: list[MilvusIndex] = []

    def make(
        uri: str = str(tmp_path / "deep" / "index.db"), embedder: str = "embedder", **options: float
    ) -> MilvusIndex:
        opened.append(MilvusIndex(uri, DIM, embedder, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for index in opened:
        index.close()


@pytest.fixture
def index(open_index: Open) -> MilvusIndex:
    return open_index()


def dense(index: MilvusIndex, number: int, limit: int = 3, namespace: str = "ns") -> list[str]:
    return [c.node_id for c in index.search_dense(namespace, embedding(number), limit)]


def test_an_empty_index_finds_nothing(index: MilvusIndex) -> None:
    assert dense(index, 0) == []
    assert index.ids() == set()
    assert len(index) == 0
    index.add([])
    index.remove(["unknown"])
    assert index.reconcile([]) == (0, 0)


@pytest.mark.parametrize("flushed", [False, True])
def test_search_ranks_and_stays_in_the_namespace(index: MilvusIndex, flushed: bool) -> None:
    index.add([record(i) for i in range(12)])
    index.add([record(20, 'other"; 1 == 1'), record(21, "")])
    if flushed:
        index.wait_ready()
    assert dense(index, 5)[0] == "node-5"
    assert set(dense(index, 5)[1:]) == {"node-4", "node-6"}
    assert index.search_dense("ns", embedding(5), 1)[0].score == pytest.approx(1, abs=1e-5)
    assert dense(index, 20, namespace='other"; 1 == 1') == ["node-20"]
    assert dense(index, 21, namespace="") == ["node-21"]
    assert dense(index, 5, namespace="nobody") == []
    assert dense(index, 5, limit=0) == []


def test_flushing_on_the_way_loses_nothing(open_index: Open) -> None:
    index = open_index(flush_every=3)
    for i in range(10):
        index.add([record(i)])
        assert dense(index, i)[0] == f"node-{i}"
    assert index.ids() == {f"node-{i}" for i in range(10)}


def test_removed_nodes_are_gone(index: MilvusIndex) -> None:
    index.add([record(i) for i in range(6)])
    index.flush()
    index.add([record(i) for i in range(6, 9)])
    index.remove(["node-4", "node-7", 'x" or 1 == 1 or node_id == "', "back\\slash\n"])
    assert len(index) == 7
    assert "node-4" not in dense(index, 4)
    assert "node-7" not in dense(index, 7)
    index.remove(f"node-{i}" for i in range(9))
    assert index.ids() == set()


def test_records_without_embedding_are_not_found(index: MilvusIndex) -> None:
    index.add([record(1, embedded=False), record(2)])
    assert dense(index, 1) == ["node-2"]
    index.add([record(1)])
    assert dense(index, 1)[0] == "node-1"
    assert len(index) == 2


def test_rows_say_nothing_of_a_prompt_but_its_embedding(index: MilvusIndex) -> None:
    index.add([record(1)])
    with index._milvus.use("list") as client:
        [row] = client.query(index.collection, filter='node_id != ""', output_fields=["*"])
    assert row.keys() == {"node_id", "namespace", "embedded", "dense"}


def test_what_was_added_survives_closing(open_index: Open) -> None:
    first = open_index()
    first.add([record(i) for i in range(5)])
    first.close()
    with pytest.raises(IndexUnavailableError, match="closed"):
        first.ids()
    second = open_index()
    second.wait_ready()
    assert second.ids() == {f"node-{i}" for i in range(5)}
    assert dense(second, 2)[0] == "node-2"


def test_two_users_of_one_file_in_a_process_do_not_close_it_on_each_other(open_index: Open) -> None:
    one, two = open_index(), open_index()
    one.add([record(1)])
    assert two.ids() == {"node-1"}
    one.close()
    assert two.ids() == {"node-1"}


def test_reconcile_adds_what_is_missing_and_removes_the_rest(index: MilvusIndex) -> None:
    index.add([record(i) for i in range(4)])
    assert index.reconcile([record(i) for i in range(2, 7)]) == (3, 2)
    assert index.ids() == {f"node-{i}" for i in range(2, 7)}
    assert dense(index, 6)[0] == "node-6"
    assert index.reconcile([record(9)], remove_others=False) == (1, 0)
    assert len(index) == 6


def test_namespaces_made_to_collide_are_two(index: MilvusIndex) -> None:
    mine, theirs = twin_texts()
    index.add([record(1, mine), record(2, theirs)])
    index.flush()
    assert dense(index, 1, namespace=mine) == ["node-1"]
    assert dense(index, 2, namespace=theirs) == ["node-2"]


def test_another_embedder_or_version_starts_afresh(
    open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_index()
    old.add([record(1)])
    old.close()
    other = open_index(embedder="another embedder")
    assert other.ids() == set()
    assert other.reconcile([record(2)]) == (1, 0)
    other.close()
    monkeypatch.setattr(milvus_rows, "SCHEMA_VERSION", milvus_rows.SCHEMA_VERSION + 1)
    newer = open_index(embedder="another embedder")
    assert newer.collection != other.collection
    assert newer.ids() == set()
    newer.close()
    monkeypatch.undo()
    # The first was dropped when the file got another owner.
    assert open_index().ids() == set()


def test_an_unreachable_server_is_one_short_failure(open_index: Open) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    index = open_index(f"http://127.0.0.1:{port}", timeout=0.5, retry_after=60)
    with pytest.raises(IndexUnavailableError, match="search") as info:
        dense(index, 1)
    assert info.value.__cause__ is not None
    for call in (index.ids, index.flush, index.wait_ready, lambda: index.add([record(1)])):
        with pytest.raises(IndexUnavailableError, match="left alone"):
            call()


def test_a_server_that_never_answers_is_given_up(open_index: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = open_index(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
        with pytest.raises(IndexUnavailableError):
            dense(index, 1)


def test_a_file_that_cannot_be_opened_is_unavailable(open_index: Open, tmp_path: Path) -> None:
    (tmp_path / "index.db").write_text("not a folder")
    with pytest.raises(IndexUnavailableError):
        open_index(str(tmp_path / "index.db")).ids()


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\*\.db"):
        MilvusIndex(str(tmp_path / "index"), DIM, "embedder")
    with pytest.raises(ConfigError, match="positive"):
        MilvusIndex("x.db", 0, "embedder")
    index = MilvusIndex(str(tmp_path / "index.db"), DIM, "embedder")
    with pytest.raises(ValueError, match="shape"):
        index.search_dense("ns", np.zeros(DIM + 1, dtype=np.float32), 1)
    with pytest.raises(ValueError, match="shape"):
        index.add(
            [IndexRecord("a", "ns", record(1).align_keys, np.zeros(DIM + 1, dtype=np.float32))]
        )
    with pytest.raises(ValueError, match="node id"):
        index.add([IndexRecord("a" * 300, "ns", record(1).align_keys)])
    # None of these got as far as opening the file.
    assert not (tmp_path / "index.db").exists()


@pytest.mark.parametrize("uri", ["http://host:19530", ""])
def test_idle_connections_are_not_pinged(
    uri: str, open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or Milvus Lite hangs up, and the next search fails."""
    asked: list[int] = []

    def connect(*_: object, grpc_options: dict[str, int], **__: object) -> None:
        asked.append(grpc_options["grpc.keepalive_time_ms"])
        raise OSError

    monkeypatch.setattr("pymilvus.MilvusClient", connect)
    index = open_index(uri) if uri else open_index()
    with pytest.raises(IndexUnavailableError):
        index.search_dense("ns", embedding(1), 1)
    assert asked and min(asked) >= 300_000  # what gRPC's servers allow
