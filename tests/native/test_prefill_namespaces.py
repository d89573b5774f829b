"""Nothing crosses from one namespace into another."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from kvshare_mm.native.prefill import provenance
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.stream import text_stream

from ..collisions import twin_texts
from .donor_server import NS, OTHER_NS, Server, _edited, _ids


def test_namespaces_differ_by_model_and_salt() -> None:
    names = {namespace(f, s) for f in ("a", "b", "a-b") for s in ("", "x", "b-x")}
    assert len(names) == 9


def test_salts_made_to_collide_are_two() -> None:
    """A tenant chooses its salt, and could choose one that an unseeded hash takes for another."""
    one, other = twin_texts()
    assert xxhash.xxh3_128_digest(one.encode()) == xxhash.xxh3_128_digest(other.encode())
    assert namespace("model", one) != namespace("model", other)
    assert namespace("model", "\udc80") != namespace("model", "\udc81")  # JSON can spell them


@pytest.mark.parametrize("reuse", ["similar", "exact"])
def test_the_same_tokens_under_another_salt(server: Server, reuse: str) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    for asked in (ids, _edited(ids, 30), ids[:40]):
        result = server.prefill(asked, OTHER_NS, reuse=reuse)
        server.assert_full(asked, result)
        assert provenance(result).donors == ()


def test_an_id_of_another_namespace_gives_nothing(server: Server) -> None:
    ids = _ids(60, 0)
    _, theirs = server.serve(ids)
    mine = _ids(60, 1)
    server.serve(mine, OTHER_NS)
    for asked in (ids, _edited(ids, 30), np.concatenate((mine[:20], ids))):
        result = server.prefill(asked, OTHER_NS, similar=(theirs, "made up", theirs))
        assert theirs not in result.plan.donors
        assert result.fallback is None, "not even planned with"
        assert result.plan.num_reused + result.plan.num_exact <= 20


def test_the_namespace_is_checked_again_when_kv_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a search that is all wrong does not mix namespaces."""
    ids = _ids(60, 0)
    _, theirs = server.serve(ids)
    find = server.pool.reuse.find
    monkeypatch.setattr(
        server.pool.reuse, "find", lambda stream, ns, *rest: find(stream, NS, *rest)
    )
    result = server.prefiller.prefill(1, text_stream(ids), OTHER_NS)
    assert result.fallback == "wrong_namespace"
    server.assert_full(ids, result)
    assert server.pool.store.counters["read_wrong_namespace"] == 1
    assert theirs in server.pool.tree  # it did nothing wrong
