"""What encoders make is kept, shared within a namespace, and made again where it is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


def test_known_features_are_not_made_again_and_give_what_the_encoder_gives(
    server: Server,
) -> None:
    first = server.serve(user(see(), say("What is it?")))
    messages = user(say("Now: "), see(), say("What is it?"))
    result = server.prefill(server.oracle.stream(messages), reuse="exact")
    full = server.oracle.full(server.oracle.inputs(messages))
    assert first.media[0].content_hash == result.media[0].content_hash
    assert [use.source for use in result.media] == ["features"]  # its KV is elsewhere
    assert (server.runs, server.hits) == (1, 1)
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)


def test_one_picture_twice_runs_the_encoder_once(server: Server) -> None:
    result = server.serve(user(see(), say(" and again "), see()))
    assert [use.source for use in result.media] == ["encoder", "features"]
    assert (server.runs, server.hits) == (1, 1)


@pytest.mark.parametrize(
    ("options", "ns", "kept"),
    [({"reuse": "off"}, NS, 0), ({"store": False}, NS, 0), ({}, OTHER_NS, 2)],
    ids=["off", "not stored", "another tenant"],
)
def test_features_are_kept_for_those_who_share(
    server: Server, options: dict[str, Any], ns: str, kept: int
) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    server.prefill(stream, **options)
    server.prefill(stream, ns, **options)
    assert (server.runs, server.hits) == (2, 0)
    assert len(media_ids(server.pool.store)) == len(server.pool.store.ids()) == kept


def test_features_that_are_gone_are_made_again(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    first = server.prefill(stream)
    server.pool.store.delete(media_id(NS, stream.items[0]))
    again = server.prefill(stream)
    assert (server.runs, server.hits) == (2, 0)
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


@pytest.mark.parametrize(
    ("method", "error"),
    [("get", KVUnavailableError("corrupt", "a bad sector")), ("put", OSError("disk full"))],
)
def test_a_store_that_fails_is_a_miss(
    server: Server, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    first = server.prefill(stream, store=method == "get")
    monkeypatch.setattr(server.pool.store, method, Mock(side_effect=error))
    again = server.prefill(stream)
    assert again.fallback is None
    assert server.encoder.counters["store_error"] == 1
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


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


def test_features_outlive_the_process(oracles: Oracles, tmp_path: Path) -> None:
    oracle = oracles("qwen2_5_vl")
    first = Server(oracle, DiskTier(tmp_path / "kv", 1 << 26))
    first.serve(user(say(DONOR_TEXT), see(2), say("What is it?")))
    assert first.pool.flush(60)
    first.pool.close()
    second = Server(oracle, DiskTier(tmp_path / "kv", 1 << 26))
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
