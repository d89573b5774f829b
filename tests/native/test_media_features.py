"""What encoders make is kept, shared within a namespace, and made again where it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.reuse.repair import NoRepair
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.media import media_id, media_ids

from .media_server import (
    ATOL,
    DONOR_TEXT,
    NS,
    OTHER_NS,
    Oracles,
    Server,
    say,
    see,
    user,
)


@pytest.fixture
def server(oracles: Oracles) -> Server:
    return Server(oracles("qwen2_5_vl"))


def test_features_of_a_known_picture_are_not_made_again(server: Server) -> None:
    server.serve(user(see(), say("What is it?")))
    result = server.prefill(server.oracle.stream(user(say("A"), see())), reuse="exact")
    assert [use.source for use in result.media] == ["features"]  # its KV is elsewhere
    assert (server.runs, server.hits) == (1, 1)


def test_reused_and_known_features_give_what_the_encoder_gives(server: Server) -> None:
    first = server.serve(user(see(), say("What is it?")))
    messages = user(say("Now: "), see(), say("What is it?"))
    stream = server.oracle.stream(messages)
    result = server.prefill(stream, reuse="exact")
    full = server.oracle.full(server.oracle.inputs(messages))
    assert first.media[0].content_hash == result.media[0].content_hash
    assert server.hits == 1
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)


def test_one_picture_twice_runs_the_encoder_once(server: Server) -> None:
    result = server.serve(user(see(), say(" and again "), see()))
    assert [use.source for use in result.media] == ["encoder", "features"]
    assert (server.runs, server.hits) == (1, 1)


def test_without_reuse_nothing_is_taken_or_kept(server: Server) -> None:
    for _ in range(2):
        server.prefill(server.oracle.stream(user(see(), say("?"))), reuse="off")
    assert (server.runs, server.hits) == (2, 0)
    assert server.pool.store.bytes_by_tier() == {"host": 0}


def test_a_request_that_is_not_stored_leaves_no_features(server: Server) -> None:
    server.prefill(server.oracle.stream(user(see(), say("?"))), store=False)
    assert server.pool.store.bytes_by_tier() == {"host": 0}


def test_tenants_do_not_share_features(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    server.prefill(stream)
    server.prefill(stream, OTHER_NS)
    assert (server.runs, server.hits) == (2, 0)


def test_features_that_are_gone_are_made_again(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    first = server.prefill(stream)
    server.pool.store.delete(media_id(NS, stream.items[0]))
    again = server.prefill(stream)
    assert (server.runs, server.hits) == (2, 0)
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


def test_features_that_cannot_be_read_are_a_miss(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    first = server.prefill(stream)

    def broken(*_: Any) -> Any:
        raise KVUnavailableError("corrupt", "a bad sector")

    monkeypatch.setattr(server.pool.store, "get", broken)
    again = server.prefill(stream)
    assert server.encoder.counters["store_error"] == 1
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


def test_features_that_cannot_be_kept_fail_nobody(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(server.pool.store, "put", full)
    result = server.prefill(server.oracle.stream(user(see(), say("?"))))
    assert result.fallback is None
    assert server.encoder.counters["store_error"] == 1


def test_a_repair_inside_a_known_picture_needs_no_encoder(server: Server) -> None:
    server.serve(user(say(DONOR_TEXT), see(), say("What is it?")))
    messages = user(say("Dear shop. " + DONOR_TEXT), see(), say("What is it?"))
    stream = server.oracle.stream(messages)
    [segment] = stream.media

    class InThePicture(NoRepair):
        def positions(self, plan: ReusePlan) -> np.ndarray:
            return np.arange(segment.start + 1, segment.end)

    result = server.prefill(stream, policy=InThePicture())
    assert set(range(segment.start, segment.end)) & set(result.plan.repair.tolist())
    assert server.runs == 1
    assert [use.source for use in result.media] == ["features"]


def test_features_are_listed_by_namespace(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("and"), see(1)))
    server.prefill(stream)
    server.prefill(stream, OTHER_NS)
    store = server.pool.store
    assert media_ids(store, NS) == sorted(media_id(NS, item) for item in stream.items)
    assert len(media_ids(store)) == 4
    assert media_ids(store, namespace("tiny", "a third")) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[], DiskTier]]:
    yield lambda: DiskTier(tmp_path / "kv", 1 << 26)


def test_pictures_outlive_the_process(oracles: Oracles, disk: Callable[[], DiskTier]) -> None:
    oracle = oracles("qwen2_5_vl")
    first = Server(oracle, disk())
    first.serve(user(say(DONOR_TEXT), see(2), say("What is it?")))
    assert first.pool.flush(20)
    first.pool.close()
    second = Server(oracle, disk())
    assert second.pool.counters["restored"] == 1
    target = user(say("Dear shop. " + DONOR_TEXT), see(2), say("What is it?"))
    result = second.prefill(oracle.stream(target))
    assert [use.source for use in result.media] == ["kv"]
    assert result.plan.num_reused > 8
    second.assert_first_layer(target)
    other = oracle.stream(user(say("Hm. "), see(2)))
    assert [use.source for use in second.prefill(other, reuse="exact").media] == ["features"]
    assert second.runs == 0
    second.pool.close()
