"""What is given to other replicas and taken back, while Redis and Milvus come and go."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.index.base import IndexUnavailableError
from kvshare_mm.index.shared import Fingerprints, SharedCatalogue
from kvshare_mm.node import Node, Span
from kvshare_mm.reuse import publish
from kvshare_mm.reuse.publish import Publisher
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.remote_redis import RedisStore
from kvshare_mm.store.shared import SharedTier

from ..helpers import until
from ..remote_servers import MilvusServer, RedisServer, redis_server

_PRINTS = Fingerprints(b"s" * 32, "ns")
_KEYS = np.arange(100, dtype=np.uint64)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def milvus(tmp_path: Path) -> Iterator[MilvusServer]:
    server = MilvusServer(tmp_path)
    yield server
    server.kill()


class Replica:
    """What publishes, and what another one would find."""

    def __init__(self, redis: RedisServer, milvus: MilvusServer) -> None:
        self.counters: Counter[str] = Counter()
        self.tier = SharedTier(RedisStore(redis.url, 5.0, retry_after_s=0.1), 1000.0)
        self.other = SharedCatalogue(milvus.url, "other", 1000.0, timeout=20, retry_after=0.1)
        self.own = SharedCatalogue(milvus.url, "own", 1000.0, timeout=20, retry_after=0.1)
        self.kept = {f"{i:032x}" for i in range(40)}
        self.publisher = Publisher(
            self._stored, self.tier, self.own, lambda _: _PRINTS, set(), self.counters
        )

    def _stored(self, node_id: str, ns: str) -> StoredNode:
        if node_id not in self.kept:
            raise KVUnavailableError("evicted", "it is gone")
        kv = torch.zeros(1, 1, len(_KEYS), 4)
        return StoredNode(Node(node_id, ns, _KEYS, (Span(0, len(_KEYS)),)), NodeKV(kv, kv))

    def publish(self, *numbers: int) -> None:
        for number in numbers:
            self.publisher.publish(f"{number:032x}", "ns")
        assert self.publisher.flush(60)

    def withdraw(self, *numbers: int) -> None:
        for number in numbers:
            self.kept.discard(f"{number:032x}")
            self.publisher.withdraw(f"{number:032x}", "ns")
        assert self.publisher.flush(60)

    def found(self) -> set[int]:
        """By another replica."""
        return {int(i, 16) for i in self.other.search(_PRINTS, _PRINTS.of(_KEYS, ()), 100)}

    def found_when_up(self) -> set[int]:
        try:
            return self.found()
        except IndexUnavailableError:
            return set()

    def close(self) -> None:
        self.publisher.close(5)
        for catalogue in (self.own, self.other):
            catalogue.close()
        self.tier.remote.close()


@pytest.fixture
def replica(
    redis: RedisServer, milvus: MilvusServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Replica]:
    monkeypatch.setattr(publish, "_RETRY_S", 0.1)
    made = Replica(redis, milvus)
    yield made
    made.close()


def test_what_was_deleted_while_redis_hung_is_deleted_when_it_goes_on(
    replica: Replica, redis: RedisServer
) -> None:
    replica.publish(1, 2)
    redis.hang()
    replica.withdraw(1)
    assert replica.counters["shared_write_shared_down"]
    assert replica.found() == {2}
    redis.go_on()
    until(lambda: len(redis.nodes()) == 1)

    def there() -> bool:
        # What was sent while it hung is done now, and the publisher may not have heard of it yet.
        with suppress(KVUnavailableError):
            return replica.tier.head(f"{2:032x}", "ns").node.node_id == f"{2:032x}"
        return False

    until(there)


@pytest.mark.parametrize("lost", [False, True], ids=["rows kept", "rows lost"])
def test_what_was_written_while_milvus_was_down_is_found_when_it_is_back(
    replica: Replica, milvus: MilvusServer, tmp_path: Path, lost: bool
) -> None:
    replica.publish(1, 2)
    milvus.kill()
    replica.publish(3)
    replica.withdraw(1)
    assert replica.counters["shared_write_catalogue_down"]
    if lost:
        for path in tmp_path.iterdir():
            path.rename(path.with_suffix(".lost"))
    milvus.start()
    until(lambda: replica.found_when_up() == ({3} if lost else {2, 3}), 120)


def test_rows_of_what_redis_evicted_are_removed_when_somebody_meets_them(
    replica: Replica, redis: RedisServer
) -> None:
    replica.publish(1, 2)
    redis.client.delete(*redis.nodes())
    replica.publish(2)
    for number in (1, 2):
        replica.publisher.check(f"{number:032x}", "ns")
    assert replica.publisher.flush(60)
    assert replica.found() == {2}


def test_what_waits_for_milvus_is_bounded(
    replica: Replica, milvus: MilvusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_MAX_QUEUED", 4)
    milvus.kill()
    for number in range(8):
        replica.publish(number)
    assert list(replica.publisher._rows) == [f"{i:032x}" for i in range(4, 8)]
    assert replica.counters["shared_write_queue_full"] == 4
    milvus.start()
    until(lambda: not replica.publisher._rows, 120)
    assert replica.found() == {4, 5, 6, 7}


def test_who_waits_beside_the_end_is_let_go(replica: Replica, monkeypatch) -> None:
    """There is no time for all of it: what is left is counted."""
    go = threading.Event()
    take = replica.publisher._take
    monkeypatch.setattr(replica.publisher, "_take", lambda *order: go.wait(60) and take(*order))
    for number in range(40):
        replica.publisher.publish(f"{number:032x}", "ns")
    flushed: list[bool] = []
    flushing = threading.Thread(target=lambda: flushed.append(replica.publisher.flush(60)))
    flushing.start()
    replica.publisher.close(0.1)
    go.set()
    flushing.join(60)
    assert flushed == [True]
    told = replica.counters
    assert told["shared_published"] + told["shared_write_closed"] == 40
    assert told["shared_write_closed"] > 0


def test_what_comes_after_the_end_is_dropped_and_nobody_waits_for_it(replica: Replica) -> None:
    replica.publisher.close(60)
    replica.publisher.publish(f"{1:032x}", "ns")
    replica.publisher.withdraw(f"{1:032x}", "ns")
    replica.publisher.check(f"{2:032x}", "ns")
    assert replica.publisher.flush(0)
    assert replica.counters == {"shared_write_closed": 3}


def test_what_was_published_again_since_it_was_missed_stays(
    replica: Replica, milvus: MilvusServer
) -> None:
    replica.publish(1, 2)
    replica.tier.delete(f"{1:032x}", "ns")
    milvus.kill()
    replica.publisher.check(f"{1:032x}", "ns")
    assert replica.publisher.flush(60)
    assert replica.counters["shared_write_catalogue_down"]
    replica.publisher.publish(f"{1:032x}", "ns")
    milvus.start()
    until(lambda: replica.found_when_up() == {1, 2}, 120)
    replica.publish(3)
    until(lambda: replica.found_when_up() == {1, 2, 3}, 120)


def test_what_fails_takes_nothing_else_with_it(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion in the same batch is carried out."""
    replica.publish(1, 2)
    begun, go_on = threading.Event(), threading.Event()
    stored = replica.publisher._stored

    def failing(node_id: str, ns: str) -> StoredNode:
        begun.set()
        assert go_on.wait(30)
        if node_id == f"{1:032x}":
            raise MemoryError("no room for it")
        return stored(node_id, ns)

    monkeypatch.setattr(replica.publisher, "_stored", failing)
    replica.publisher.publish(f"{3:032x}", "ns")
    assert begun.wait(30)  # what comes now is one batch
    replica.publisher.publish(f"{1:032x}", "ns")
    replica.publisher.withdraw(f"{2:032x}", "ns")
    go_on.set()
    assert replica.publisher.flush(30)
    assert replica.counters["shared_error"] == 1
    assert not replica.tier.keep(f"{2:032x}", "ns")
    assert replica.found() == {1, 3}
