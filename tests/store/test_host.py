"""The RAM tier."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.store.host import HostTier, ram_bytes

from ..helpers import in_threads


def test_put_get_delete(make_stored):
    tier = HostTier(10_000)
    stored = make_stored("a", embedding=np.zeros(3, np.float32))
    assert tier.put(stored) == []
    assert tier.get("a") is stored
    assert tier.peek("a") is stored
    assert ("a" in tier, list(tier), len(tier)) == (True, ["a"], 1)
    # K and V, 8 keys, an embedding of 3.
    assert tier.num_bytes == stored.kv.num_bytes + 64 + 12

    tier.delete("a")
    tier.delete("a")
    assert ("a" in tier, list(tier), len(tier), tier.num_bytes) == (False, [], 0, 0)
    assert tier.peek("a") is None
    with pytest.raises(KVUnavailableError) as caught:
        tier.get("a")
    assert caught.value.reason == "evicted"


def test_get_protects_from_eviction_and_peek_does_not(make_stored):
    nodes = {name: make_stored(name) for name in "abc"}
    size = ram_bytes(nodes["a"])
    for read, evicted in (("get", ["b"]), ("peek", ["a"])):
        tier = HostTier(2 * size)
        tier.put(nodes["a"])
        tier.put(nodes["b"])
        getattr(tier, read)("a")
        assert tier.put(nodes["c"]) == evicted
        assert evicted[0] not in tier and tier.peek(evicted[0]) is None
        assert tier.num_bytes == 2 * size


def test_threads_do_not_disturb_each_other(make_stored, assert_same):
    nodes = {str(i): make_stored(str(i), 1 + i) for i in range(20)}
    tier = HostTier(sum(map(ram_bytes, nodes.values())) // 3)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            node_id = str(rng.randrange(20))
            action = rng.choice(["put", "put", "get", "get", "delete", "pin", "unpin"])
            if action == "put":
                tier.put(nodes[node_id])
            elif action == "get":
                try:
                    assert_same(tier.get(node_id), nodes[node_id])
                except KVUnavailableError as error:
                    assert error.reason == "evicted"
            elif action == "pin":
                tier.pin(node_id, 0.001)
            else:
                getattr(tier, action)(node_id)
            assert tier.num_bytes <= tier.max_bytes

    in_threads(work, range(4))
    assert tier.num_bytes == sum(ram_bytes(nodes[node_id]) for node_id in tier) <= tier.max_bytes
    assert all(tier.peek(node_id) is nodes[node_id] for node_id in tier)
