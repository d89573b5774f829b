"""Nodes in a store that replicas share: what is put comes back, and what is wrong is a miss."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError, KVUnavailableError
from kvshare_mm.node import Piece, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.remote_mooncake import MooncakeStore
from kvshare_mm.store.remote_redis import RedisStore
from kvshare_mm.store.shared import BLOCK, RemoteStore, SharedTier, narrowed, rows_of

from ..helpers import until
from ..remote_servers import RedisServer, SharedServer, shared_server

Make = Callable[..., StoredNode]
KINDS = ["redis", "mooncake"]
only_redis = pytest.mark.parametrize("server", ["redis"], indirect=True)


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[SharedServer]:
    with shared_server(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def remote(server: SharedServer) -> Iterator[RemoteStore]:
    found = server.open(timeout_s=30)
    yield found
    found.close()


@pytest.fixture
def tier(server: SharedServer, remote: RemoteStore) -> SharedTier:
    server.clear()
    return SharedTier(remote, 100.0)


def all_of(tier: SharedTier, node_id: str, namespace: str = "ns") -> StoredNode:
    head = tier.head(node_id, namespace)
    got, kv = tier.rows(head, np.ones(head.node.num_owned, bool))
    assert got.all()
    return StoredNode(head.node, kv)


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(KVUnavailableError) as caught:
        call()
    return caught.value.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_a_node_comes_back_as_it_was(
    tier: SharedTier, make_stored: Make, assert_same: Callable, num_tokens: int, dtype: torch.dtype
) -> None:
    stored = make_stored("a", num_tokens, dtype=dtype, heads=3, k_dim=6, exact_len=1)
    tier.put(stored)
    assert_same(all_of(tier, "a"), stored)


def test_eight_bits_come_back_as_they_were(
    tier: SharedTier, make_stored: Make, assert_same: Callable
) -> None:
    stored = make_stored("a", BLOCK + 9, heads=3, k_dim=40)
    stored = replace(stored, kv=NodeKV.packed(stored.kv.k, stored.kv.v))
    tier.put(stored)
    assert_same(all_of(tier, "a"), stored)


def test_a_node_that_owns_nothing(tier: SharedTier, make_stored: Make) -> None:
    tier.put(make_stored("a", 8, own=(), pieces=(Piece("b", 0, 0, 8),)))
    assert all_of(tier, "a").node.pieces == (Piece("b", 0, 0, 8),)


def test_only_the_blocks_that_are_needed_are_read(
    server: SharedServer, tier: SharedTier, make_stored: Make
) -> None:
    stored = make_stored("a", 500, own=((100, 400),))
    tier.put(stored)
    [key] = server.nodes()
    server.drop(key, "0", "2", "3", "4")  # whoever reads them finds nothing
    head = tier.head("a", "ns")
    wanted = rows_of(head.node, [Span(0, 10), Span(100 + BLOCK, 102 + BLOCK)])
    assert np.flatnonzero(wanted).tolist() == [BLOCK, BLOCK + 1]
    got, kv = tier.rows(head, wanted)
    assert np.flatnonzero(got).tolist() == list(range(BLOCK, 2 * BLOCK))
    assert torch.equal(kv.k, stored.kv.k[:, :, got])
    assert torch.equal(kv.v, stored.kv.v[:, :, got])
    node = narrowed(head.node, got, lambda *_: np.zeros(0, bool))
    assert node.own == (Span(100 + BLOCK, 100 + 2 * BLOCK),)
    assert head.num_bytes(wanted) == kv.num_bytes
    assert reason(lambda: tier.rows(head, ~wanted)) == "evicted"


def test_what_is_borrowed_is_narrowed_to_what_the_owner_has(make_stored: Make) -> None:
    node = make_stored("a", 10, own=((6, 10),), pieces=(Piece("b", 20, 0, 6),)).node
    here = np.array([0, 1, 1, 0, 0, 1], bool)
    asked = []

    def borrowed(*piece: object) -> np.ndarray:
        asked.append(piece)
        return here

    found = narrowed(node, np.array([1, 1, 0, 1], bool), borrowed)
    assert asked == [("b", 20, 6)]
    assert found.own == (Span(6, 8), Span(9, 10))
    assert found.pieces == (Piece("b", 21, 1, 2), Piece("b", 25, 5, 1))


def test_every_flip_and_every_cut_is_noticed(
    server: SharedServer, tier: SharedTier, make_stored: Make, assert_same: Callable
) -> None:
    stored = make_stored("a", BLOCK + 6)
    tier.put(stored)
    [key] = server.nodes()
    whole = server.parts(key)
    rng = np.random.default_rng(0)
    for part, content in whole.items():
        damaged = [content[:n] for n in (1, 10, len(content) // 2, len(content) - 1)]
        if isinstance(server, RedisServer):  # Mooncake keeps nothing that is empty
            damaged.append(b"")
        damaged += [content + b"\0", whole["1" if part == "0" else "0"]]
        for at in rng.integers(0, len(content), 200):
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.integers(8)
            damaged.append(bytes(flipped))
        for wrong in damaged:
            server.write(key, part, wrong)
            assert reason(lambda: all_of(tier, "a")) == "corrupt"
        server.write(key, part, content)
    assert_same(all_of(tier, "a"), stored)


def test_another_namespace_has_nothing_of_it(
    server: SharedServer, tier: SharedTier, make_stored: Make
) -> None:
    tier.put(make_stored("a", namespace="one"))
    assert reason(lambda: tier.head("a", "two")) == "evicted"
    # Not even where the one's bytes lie under the other's name.
    [key] = server.nodes()
    tier.put(make_stored("a", namespace="two"))
    [other] = set(server.nodes()) - {key}
    for part, content in server.parts(key).items():
        server.write(other, part, content)
    assert reason(lambda: tier.head("a", "two")) == "wrong_namespace"


def test_a_node_that_is_deleted_is_gone(
    server: SharedServer, tier: SharedTier, make_stored: Make
) -> None:
    tier.put(make_stored("a", 100 * BLOCK, dtype=torch.bfloat16))
    tier.put(make_stored("b"))
    assert tier.keep("a", "ns")
    tier.delete("a", "ns")
    tier.delete("unknown", "ns")
    assert len(server.nodes()) == 1
    assert not tier.keep("a", "ns")
    assert reason(lambda: tier.head("a", "ns")) == "evicted"


@only_redis
def test_a_node_is_gone_when_nobody_asks_for_it(
    server: RedisServer, tier: SharedTier, make_stored: Make
) -> None:
    tier.put(make_stored("a"))
    [key] = server.nodes()
    assert 90_000 < server.client.pttl(key) <= 100_000
    server.client.pexpire(key, 50_000)
    tier.head("a", "ns")
    assert 90_000 < server.client.pttl(key) <= 100_000


@only_redis
def test_a_server_that_is_full_keeps_what_it_has(
    server: RedisServer, tier: SharedTier, make_stored: Make, assert_same: Callable
) -> None:
    small, large = make_stored("a"), make_stored("b", 4 * BLOCK)
    tier.put(small)
    secret = tier.remote.agree("secret", b"mine")
    server.client.config_set("maxmemory", 1)
    for _ in range(5):  # no reason to leave it alone
        assert reason(lambda: tier.put(large)) == "shared_full"
    assert tier.remote.agree("secret", b"another") == secret == b"mine"
    assert reason(lambda: tier.head("b", "ns")) == "evicted"
    # What it took of a node before it was full does not fill it.
    kept = server.nodes()
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + (3 << 20))
    larger = make_stored("c", 6 * BLOCK, k_dim=2048)
    assert reason(lambda: tier.put(larger)) == "shared_full"
    assert server.nodes() == kept
    server.client.config_set("maxmemory", 0)


def test_a_mooncake_that_is_full_drops_nodes_whole_that_were_used_longest_ago() -> None:
    with shared_server("mooncake", mib=64) as server:
        remote = server.open(timeout_s=30)
        secret = remote.agree("secret", b"mine")

        def put(node: str) -> bool:
            with suppress(KVUnavailableError):  # room is being made
                for part in ("0", "1", "record"):
                    remote.put(node, part, bytes(1 << 20), 1.0)
                return True
            return False

        for number in range(60):
            until(lambda number=number: put(f"node-{number}"))
            assert remote.lease("node-0", 1.0)
        assert not remote.lease("node-1", 1.0)
        assert remote.lease("node-59", 1.0)
        assert {len(server.parts(key)) for key in server.nodes()} == {3}
        assert remote.agree("secret", b"another") == secret == b"mine"
        remote.close()


def test_what_was_put_half_is_no_node(
    tier: SharedTier, make_stored: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = make_stored("a", 3 * BLOCK)
    tier.put(stored)

    put = tier.remote.put

    def dies(key: str, part: str, content: bytes | memoryview, ttl_s: float) -> None:
        if part == "2":
            raise KVUnavailableError("shared_down", "killed here")
        put(key, part, content, ttl_s)

    monkeypatch.setattr(tier.remote, "put", dies)
    assert reason(lambda: tier.put(stored)) == "shared_down"
    assert reason(lambda: tier.head("a", "ns")) == "evicted"


def test_a_new_version_under_a_reader_is_a_miss(tier: SharedTier, make_stored: Make) -> None:
    stored = make_stored("a", 2 * BLOCK)
    tier.put(stored)
    head = tier.head("a", "ns")
    tier.put(StoredNode(stored.node, NodeKV(stored.kv.k + 1, stored.kv.v)))
    assert reason(lambda: tier.rows(head, np.ones(2 * BLOCK, bool))) == "corrupt"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", ["kill", "hang"])
def test_a_server_that_fails_is_left_alone_and_tried_again(
    make_stored: Make, failure: str, kind: str
) -> None:
    with shared_server(kind) as server:
        remote = server.open(timeout_s=0.5, retry_after_s=1000)
        tier = SharedTier(remote, 100.0)

        def works(name: str) -> bool:
            remote.breaker.down_until = 0.0
            with suppress(KVUnavailableError):
                tier.put(make_stored(name))
                return all_of(tier, name).node.node_id == name
            return False

        until(lambda: works("a"), 60)
        getattr(server, failure)()
        for _ in range(3):
            assert reason(lambda: tier.head("a", "ns")) == "shared_down"
        if failure == "kill":
            server.start()
        else:
            server.go_on()
        # It is not even asked.
        assert reason(lambda: tier.put(make_stored("b"))) == "shared_down"
        until(lambda: works("b"), 60)
        remote.close()


class SlowMooncake:
    """Mooncake's client, which does nothing more until it is let go on."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.go_on = threading.Event()
        self.done = 0

    def upsert(self, name: str, content: bytes, config: object) -> int:
        assert self.go_on.wait(60)
        self.kept[name] = content
        self.done += 1
        return 0

    def batch_remove(self, names: Sequence[str], force: bool) -> list[int]:
        return [-704 if self.kept.pop(name, None) is None else 0 for name in names]

    def close(self) -> None: ...


def test_what_mooncake_puts_after_it_was_given_up_does_not_stay() -> None:
    remote = MooncakeStore("mooncake://127.0.0.1:1", timeout_s=0.1)
    slow = remote._client = SlowMooncake()
    assert reason(lambda: remote.put("given-up", "0", b"secret", 1.0)) == "shared_down"
    remote._timeout_s = 60
    remote.delete("given-up")
    slow.go_on.set()
    until(lambda: slow.done == 1 and not slow.kept)
    remote.put("in-time", "0", b"secret", 1.0)
    remote.close()
    assert slow.kept == {"in-time/0": b"secret"}


@pytest.mark.parametrize(
    ("open_store", "url"),
    [
        (RedisStore, "localhost:6379"),
        (MooncakeStore, "mooncake://localhost"),
        (MooncakeStore, "mooncake://:50051"),
        (MooncakeStore, "mooncake://localhost:50051/0"),
        (MooncakeStore, "mooncake://localhost:50051?protokol=tcp"),
        (MooncakeStore, "mooncake://localhost:port"),
    ],
)
def test_urls_that_cannot_be_one_are_told_at_once(
    open_store: Callable[[str], object], url: str
) -> None:
    with pytest.raises(ConfigError, match="shared_store"):
        open_store(url)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(ConfigError, match="libibverbs1"):
        MooncakeStore("mooncake://localhost:50051")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs index_uri"),
        ({"index_uri": "here.db"}, "needs index_uri"),
        ({"index_uri": "http://there:19530", "engine": "vllm"}, "engine='native'"),
        # Nothing would be published: neither Redis nor Milvus has such a moment.
        ({"index_uri": "http://there:19530", "shared_ttl_s": float("inf")}, "shared_ttl_s"),
        ({"index_uri": "http://there:19530", "shared_ttl_s": 1e300}, "shared_ttl_s"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVShareConfig.of(shared_store="redis://there", **options)
