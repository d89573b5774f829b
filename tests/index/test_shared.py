"""The catalogue of replicas in a Milvus server: who finds whose donors, and what rows give away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.index import shared
from kvshare_mm.index.base import IndexLeftAloneError, IndexUnavailableError
from kvshare_mm.index.shared import Fingerprints, SharedCatalogue
from kvshare_mm.node import Node, Span
from kvshare_mm.stream import Modality, Segment

from ..remote_servers import free_port, milvus_server

SECRET = b"s" * 32
Open = Callable[..., SharedCatalogue]
texts = st.lists(st.integers(0, 49_000), min_size=3, max_size=300)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with milvus_server(tmp_path_factory.mktemp("milvus")) as found:
        yield found


@pytest.fixture
def replica(uri: str) -> Iterator[Open]:
    opened: list[SharedCatalogue] = []

    def make(name: str, ttl_s: float = 1000.0) -> SharedCatalogue:
        opened.append(SharedCatalogue(uri, name, ttl_s, timeout=20))
        return opened[-1]

    yield make
    for catalogue in opened:
        catalogue._delete("tokens >= 0")
        catalogue.close()


def node(number: int, namespace: str = "ns", media: tuple[Segment, ...] = ()) -> Node:
    """Nodes of consecutive numbers share half of their tokens."""
    keys = np.arange(number * 50, number * 50 + 100, dtype=np.uint64)
    return Node(f"{number:032x}", namespace, keys, (Span(0, 100),), media=media)


def publish(catalogue: SharedCatalogue, *nodes: Node) -> None:
    rows = [catalogue.row(n, Fingerprints(SECRET, n.namespace)) for n in nodes]
    catalogue.add([row for row in rows if row is not None])


def found(
    catalogue: SharedCatalogue, like: Node, secret: bytes = SECRET, limit: int = 4
) -> list[int]:
    prints = Fingerprints(secret, like.namespace)
    ids = catalogue.search(prints, prints.of(like.wide_keys, like.media), limit)
    return [int(node_id, 16) for node_id in ids]


def test_replicas_find_each_others_donors_the_most_alike_first(replica: Open) -> None:
    one, two = replica("one"), replica("two")
    publish(one, *map(node, range(0, 20, 2)))
    publish(two, node(5))
    assert found(two, node(4)) == [4]
    assert sorted(found(two, node(5))) == [4, 6]  # and not its own
    assert found(one, node(5)) == [5]
    assert found(two, node(5), limit=1)[0] in (4, 6)
    one.remove([node(4).node_id])
    assert found(two, node(5)) == [6]


def test_nothing_is_found_across_namespaces_and_secrets(replica: Open) -> None:
    one, two = replica("one"), replica("two")
    publish(one, node(1, "model-a"), node(2, "model-b"))
    assert found(two, node(1, "model-a")) == [1]
    assert found(two, node(1, "model-b")) == [2]
    assert found(two, node(1, "model-c")) == []
    assert found(two, node(1, "model-a"), secret=b"another") == []


def test_the_same_picture_counts_as_much_as_many_words(replica: Open) -> None:
    one, two = replica("one"), replica("two")
    photo = Segment(Modality.IMAGE, 0, 4, content_hash=77)
    other = Segment(Modality.IMAGE, 0, 4, content_hash=78)
    clip = Segment(Modality.AUDIO, 0, 4, content_hash=77)
    publish(one, node(1, media=(photo,)), node(2, media=(other,)), node(3, media=(clip,)))
    assert found(two, node(10, media=(photo,))) == [1]
    assert found(two, node(2, media=(photo,)))[:2] == [2, 1]


def left(catalogue: SharedCatalogue) -> list[int]:
    with catalogue._milvus.use("list") as client:
        rows = client.query(catalogue.collection, filter="tokens > 0", output_fields=["node_id"])
    assert all(row.keys() == {"node_id"} for row in rows)
    return sorted(int(row["node_id"], 16) for row in rows)


def test_rows_expire_and_are_removed(replica: Open) -> None:
    one, two = replica("one", ttl_s=-1), replica("two")
    publish(one, node(1))
    assert found(two, node(1)) == []
    publish(replica("three"), node(2))
    one.remove_expired()
    assert left(two) == [2]


def test_a_clock_that_is_ahead_removes_nothing_of_others(
    replica: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ahead, gone = replica("one"), replica("ahead"), replica("gone", ttl_s=-3 * 86_400)
    publish(one, node(1))
    publish(gone, node(3))
    with monkeypatch.context() as patch:
        patch.setattr(shared, "time", SimpleNamespace(time=lambda: time.time() + 7200))
        ahead.remove_expired()
    assert left(one) == [1]
    assert found(replica("two"), node(1)) == [1]


def test_ids_that_no_replica_made_are_passed_over(replica: Open) -> None:
    one, two = replica("one"), replica("two")
    prints = Fingerprints(SECRET, "ns")
    for node_id in ("a:b", "../etc", "A" * 32, "f" * 33):
        row = one.row(node(1), prints)
        assert row is not None
        one.add([row | {"node_id": node_id}])
    assert found(two, node(1)) == []


def test_a_prompt_too_short_for_an_ngram_has_no_row_and_no_answer(replica: Open) -> None:
    one = replica("one")
    short = Node("0" * 32, "ns", np.arange(2, dtype=np.uint64), (Span(0, 2),))
    assert one.row(short, Fingerprints(SECRET, "ns")) is None
    assert found(one, short) == []


def test_a_server_that_is_not_there_is_asked_once() -> None:
    catalogue = SharedCatalogue(f"http://127.0.0.1:{free_port()}", "one", 10.0, timeout=0.2)
    with pytest.raises(IndexUnavailableError):
        found(catalogue, node(1))
    with pytest.raises(IndexLeftAloneError):
        found(catalogue, node(1))
    catalogue.close()


def test_the_password_of_a_server_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    catalogue = SharedCatalogue(f"http://bob:pass@word@127.0.0.1:{port}", "a", 60.0, timeout=0.2)
    with pytest.raises(IndexUnavailableError) as caught:
        catalogue.remove_expired()
    assert f"http://127.0.0.1:{port}" in str(caught.value)
    for told in (str(caught.value), caplog.text):
        assert told and "pass" not in told and "word" not in told


@given(texts, st.text(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_fingerprints_of_one_text_have_nothing_in_common_elsewhere(
    text: list[int], one: str, other: str, secret: bytes
) -> None:
    keys = np.array(text, np.uint64)
    mine = Fingerprints(SECRET, one)
    sparse = mine.of(keys, ())
    assert sparse == Fingerprints(SECRET, one).of(keys, ())
    assert 0 < len(sparse) <= 256
    theirs = [Fingerprints(secret, one)]
    if other != one:
        theirs.append(Fingerprints(SECRET, other))
    for prints in theirs:
        assert prints.namespace != mine.namespace
        # 256 of 2**32 each: one may meet by chance.
        assert len(prints.of(keys, ()).keys() & sparse.keys()) <= 1
