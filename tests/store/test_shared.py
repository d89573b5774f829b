"""Nodes in a Redis that replicas share: what is put comes back, and what is wrong is a miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError, KVUnavailableError
from kvshare_mm.node import Piece, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.remote_redis import RedisStore
from kvshare_mm.store.shared import BLOCK, SharedTier, narrowed, rows_of

from ..remote_servers import RedisServer, redis_server

Make = Callable[..., StoredNode]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as found:
        yield found


@pytest.fixture
def tier(server: RedisServer) -> Iterator[SharedTier]:
    server.client.flushall()
    server.client.config_set("maxmemory", 0)
    remote = RedisStore(server.url)
    yield SharedTier(remote, 100.0)
    remote.close()


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
    server: RedisServer, tier: SharedTier, make_stored: Make
) -> None:
    stored = make_stored("a", 500, own=((100, 400),))
    tier.put(stored)
    [key] = server.nodes()
    server.client.hdel(key, "0", "2", "3", "4")  # whoever reads them finds nothing
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
    server: RedisServer, tier: SharedTier, make_stored: Make, assert_same: Callable
) -> None:
    stored = make_stored("a", BLOCK + 6)
    tier.put(stored)
    [key] = server.nodes()
    whole = server.client.hgetall(key)
    rng = np.random.default_rng(0)
    for part, content in whole.items():
        damaged = [content[:n] for n in (0, 10, len(content) // 2, len(content) - 1)]
        damaged += [content + b"\0", whole[b"1" if part == b"0" else b"0"]]
        for at in rng.integers(0, len(content), 200):
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.integers(8)
            damaged.append(bytes(flipped))
        for wrong in damaged:
            server.client.hset(key, part, wrong)
            assert reason(lambda: all_of(tier, "a")) == "corrupt"
        server.client.hset(key, part, content)
    assert_same(all_of(tier, "a"), stored)


def test_another_namespace_has_nothing_of_it(
    server: RedisServer, tier: SharedTier, make_stored: Make
) -> None:
    tier.put(make_stored("a", namespace="one"))
    assert reason(lambda: tier.head("a", "two")) == "evicted"
    # Not even where the one's bytes lie under the other's name.
    [key] = server.nodes()
    tier.put(make_stored("a", namespace="two"))
    [other] = set(server.nodes()) - {key}
    server.client.copy(key, other, replace=True)
    assert reason(lambda: tier.head("a", "two")) == "wrong_namespace"


def test_a_node_is_gone_when_nobody_asks_for_it(
    server: RedisServer, tier: SharedTier, make_stored: Make
) -> None:
    tier.put(make_stored("a"))
    [key] = server.nodes()
    assert 90_000 < server.client.pttl(key) <= 100_000
    server.client.pexpire(key, 50_000)
    tier.head("a", "ns")
    assert 90_000 < server.client.pttl(key) <= 100_000
    tier.delete("a", "ns")
    assert server.nodes() == []
    assert reason(lambda: tier.head("a", "ns")) == "evicted"


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
    assert_same(all_of(tier, "a"), small)


def test_what_was_put_half_is_no_node(tier: SharedTier, make_stored: Make) -> None:
    stored = make_stored("a", 3 * BLOCK)
    tier.put(stored)

    class Dies(RedisStore):
        def put(self, key: str, part: str, content: bytes | memoryview, ttl_s: float) -> None:
            if part == "2":
                raise KVUnavailableError("shared_down", "killed here")
            super().put(key, part, content, ttl_s)

    tier.remote.__class__ = Dies
    assert reason(lambda: tier.put(stored)) == "shared_down"
    assert reason(lambda: tier.head("a", "ns")) == "evicted"


def test_a_new_version_under_a_reader_is_a_miss(tier: SharedTier, make_stored: Make) -> None:
    stored = make_stored("a", 2 * BLOCK)
    tier.put(stored)
    head = tier.head("a", "ns")
    tier.put(StoredNode(stored.node, NodeKV(stored.kv.k + 1, stored.kv.v)))
    assert reason(lambda: tier.rows(head, np.ones(2 * BLOCK, bool))) == "corrupt"


@pytest.mark.parametrize("failure", ["kill", "hang"])
def test_a_server_that_fails_is_left_alone_and_tried_again(
    make_stored: Make, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis_server() as server:
        remote = RedisStore(server.url, timeout_s=0.2, retry_after_s=1000)
        tier = SharedTier(remote, 100.0)
        tier.put(make_stored("a"))
        getattr(server, failure)()
        for _ in range(3):
            assert reason(lambda: tier.head("a", "ns")) == "shared_down"
        if failure == "kill":
            server.start()
        else:
            server.go_on()
        # It is not even asked.
        assert reason(lambda: tier.put(make_stored("b"))) == "shared_down"
        remote._down_until = 0.0
        tier.put(make_stored("b"))
        assert all_of(tier, "b").node.node_id == "b"
        remote.close()


def test_urls_that_cannot_be_one_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="shared_store"):
        RedisStore("localhost:6379")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs index_uri"),
        ({"index_uri": "here.db"}, "needs index_uri"),
        ({"index_uri": "http://there:19530", "engine": "vllm"}, "engine='native'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVShareConfig.of(shared_store="redis://there", **options)
