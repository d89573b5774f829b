"""Prefill with pictures and sound: exact where it says so, turned right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.prefill import provenance
from kvshare_mm.native.slots import SlotRunner

from ..media_models import FAMILIES
from ..modalities.media import picture
from .media_server import (
    ATOL,
    DONOR_TEXT,
    MAX_LEN,
    NS,
    Oracles,
    Parts,
    Server,
    hear,
    medium,
    say,
    see,
    user,
)


@pytest.fixture
def server(oracles: Oracles) -> Server:
    return Server(oracles("qwen2_5_vl"))


# -- exactness ------------------------------------------------------------------------------------


def prompt_of(family: str, draw: Callable[[Any], Any]) -> Parts:
    """One to six parts, media and text in any order."""
    kinds = {"qwen2_audio": "at", "qwen2_5_omni_thinker": "ait"}.get(family, "it")
    parts = []
    for _ in range(draw(st.integers(1, 6))):
        kind, which = draw(st.sampled_from(kinds)), draw(st.integers(0, 3))
        text = say(["What is it?", " and ", "Order 48213.", "?"][which])
        parts.append({"i": see, "a": hear}[kind](which) if kind != "t" else text)
    return user(*parts)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_positions_over_an_exact_donor(
    oracles: Oracles, family: str, data: st.DataObject
) -> None:
    oracle = oracles(family)
    messages = prompt_of(family, data.draw)
    stream, full = oracle.stream(messages), oracle.full(oracle.inputs(messages))
    n = len(stream)
    share = data.draw(st.sampled_from([0.05, 0.3, 0.8, 1.0]))
    chosen = np.random.default_rng(data.draw(st.integers(0, 999))).random(n) < share
    compute = np.flatnonzero(chosen | (np.arange(n) == n - 1))
    runner = SlotRunner(oracle.loaded, 1, MAX_LEN, data.draw(st.sampled_from([3, 4096])))
    for tensor, source in zip(runner.slot_kv(0), (full.k, full.v), strict=True):
        tensor.fill_(float("nan"))
        tensor[:, :, :n] = source
        tensor[:, :, compute] = float("nan")
    encoder = MediaEncoder(oracle.loaded, None)
    touched = [
        (segment, item)
        for segment, item in zip(stream.media, stream.items, strict=True)
        if ((compute >= segment.start) & (compute < segment.end)).any()
    ]
    features = tuple((s.start, encoder.features(item, NS)[0]) for s, item in touched)
    media = MediaInputs(stream.positions, features)
    logits = runner.prefill(0, stream.token_ids, compute, media=media)
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    for got, want in zip(runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, :n], want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_prefill_and_an_exact_prefix_with_media(oracles: Oracles, family: str) -> None:
    server = Server(oracles(family))
    for text, source in (("What is it?", "encoder"), ("What colour does it have?", "kv")):
        messages = user(medium(family), say(text))
        result = server.serve(messages, reuse="exact")
        full = server.oracle.full(server.oracle.inputs(messages))
        assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)
        for got, want in zip(server.runner.slot_kv(0), (full.k, full.v), strict=True):
            assert torch.allclose(got[:, :, : len(full.logits)], want, atol=ATOL, rtol=0)
        [use] = result.media
        assert use.source == source
        assert (result.plan.num_exact > use.end) == (source == "kv")
        assert (server.runs, server.hits) == (1, 0)


# -- moved runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_is_turned_right(oracles: Oracles, family: str, data: st.DataObject) -> None:
    server = Server(oracles(family))
    donor = prompt_of(family, data.draw)
    parts = list(donor[0]["content"])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(parts)))
        what = data.draw(st.sampled_from(["in", "out", "move"]))
        if what == "in":
            parts[at:at] = prompt_of(family, data.draw)[0]["content"][:1]
        elif len(parts) > 1:
            taken = parts.pop(min(at, len(parts) - 1))
            if what == "move":
                parts.insert(data.draw(st.integers(0, len(parts))), taken)
    server.serve(donor)
    target = user(*parts)
    result = server.prefill(server.oracle.stream(target))
    assert result.fallback is None
    server.assert_first_layer(target)
    told = provenance(result)
    assert told.exact + told.reused + told.recomputed == result.plan.num_tokens
    given = {item.content_hash for item in server.oracle.stream(donor).items}
    for use, item in zip(result.media, server.oracle.stream(target).items, strict=True):
        whole = result.plan.kept[use.start : use.end].all()
        known = "features" if item.content_hash in given else "encoder"
        assert use.source == ("kv" if whole else known)
        given.add(item.content_hash)
    # In chunks each medium is encoded when it is come to, and all that comes of it is the same.
    prefill = server.prefiller.begin(0, server.oracle.stream(target), NS)
    for tensor in server.runner.slot_kv(0):
        tensor[:, :, result.plan.compute] = float("nan")
    while (chunked := prefill.advance(5)) is None:
        pass
    assert torch.allclose(chunked.logits, result.logits, atol=ATOL, rtol=0)
    assert [use.end for use in chunked.media] == [use.end for use in result.media]
    server.assert_first_layer(target)
    # An edited request's own KV is found at its own positions again.
    again = server.serve(target)
    assert again.fallback is None
    server.prefill(server.oracle.stream(target))
    server.assert_first_layer(target)


def test_one_pixel_is_another_picture_and_one_replaced_run(server: Server) -> None:
    one, other = picture(112, 84), picture(112, 84)
    other.putpixel((60, 40), (1, 2, 3))
    texts = say(DONOR_TEXT), say("What is it? Tell me all.")
    server.serve(user(texts[0], {"type": "image", "image": one}, texts[1]))
    target = user(texts[0], {"type": "image", "image": other}, texts[1])
    stream = server.oracle.stream(target)
    result = server.prefill(stream)
    [segment] = stream.media
    [use] = result.media
    assert use.source == "encoder"
    want = [*range(segment.start, segment.end), len(stream) - 1]
    assert result.plan.compute.tolist() == want
