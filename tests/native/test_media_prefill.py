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
def test_nothing_known_is_a_full_prefill(oracles: Oracles, family: str) -> None:
    server = Server(oracles(family))
    messages = user(say("Look: "), medium(family), say(" What is it?"))
    result = server.serve(messages)
    full = server.oracle.full(server.oracle.inputs(messages))
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)
    assert (server.runs, server.hits) == (1, 0)
    assert [use.source for use in result.media] == ["encoder"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_prefix_with_media(oracles: Oracles, family: str) -> None:
    server = Server(oracles(family))
    server.serve(user(medium(family), say("What is it?")))
    messages = user(medium(family), say("What colour does it have?"))
    result = server.prefill(server.oracle.stream(messages), reuse="exact")
    full = server.oracle.full(server.oracle.inputs(messages))
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)
    n = len(full.logits)
    for got, want in zip(server.runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, :n], want, atol=ATOL, rtol=0)
    [use] = result.media
    assert use.source == "kv"
    assert result.plan.num_exact > use.end
    assert (server.runs, server.hits) == (1, 0)


# -- moved runs -----------------------------------------------------------------------------------

EDITS: dict[str, tuple[Callable[[str], Parts], Callable[[str], Parts]]] = {
    "text before the picture": (
        lambda f: user(say(DONOR_TEXT), medium(f), say("What is it?")),
        lambda f: user(say("Dear shop. " + DONOR_TEXT), medium(f), say("What is it?")),
    ),
    "text behind the picture": (
        lambda f: user(say("Hi. "), medium(f), say("What is it? " + DONOR_TEXT)),
        lambda f: user(say("Hi. "), medium(f), say("What, then, is it? " + DONOR_TEXT)),
    ),
    "a picture put in before": (
        lambda f: user(say("Hi. "), medium(f), say(DONOR_TEXT)),
        lambda f: user(say("Hi. "), medium(f, 3), medium(f), say(DONOR_TEXT)),
    ),
    "a picture put in between": (
        lambda f: user(medium(f), say(DONOR_TEXT), medium(f, 1), say("Which?")),
        lambda f: user(medium(f), say(DONOR_TEXT), medium(f, 2), medium(f, 1), say("Which?")),
    ),
    "a picture taken out": (
        lambda f: user(medium(f, 2), say(DONOR_TEXT), medium(f, 1), say("Which one?")),
        lambda f: user(say(DONOR_TEXT), medium(f, 1), say("Which one?")),
    ),
    "a picture of another size": (
        lambda f: user(medium(f, 1), say(DONOR_TEXT), medium(f), say("Which one is it?")),
        lambda f: user(medium(f, 2), say(DONOR_TEXT), medium(f), say("Which one is it?")),
    ),
    "a picture moved to the end": (
        lambda f: user(medium(f), say(DONOR_TEXT + "What is it?")),
        lambda f: user(say(DONOR_TEXT + "What is it?"), medium(f)),
    ),
    "two pictures swapped": (
        lambda f: user(medium(f, 0), say(" or "), medium(f, 3), say(DONOR_TEXT)),
        lambda f: user(medium(f, 3), say(" or "), medium(f, 0), say(DONOR_TEXT)),
    ),
    "a picture instead of text": (
        lambda f: user(say("A lamp in blue. "), say(DONOR_TEXT), medium(f, 1), say("Yes?")),
        lambda f: user(medium(f, 2), say(DONOR_TEXT), medium(f, 1), say("Yes?")),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITS)
def test_what_moves_is_turned_right(oracles: Oracles, family: str, name: str) -> None:
    donor, target = (make(family) for make in EDITS[name])
    server = Server(oracles(family))
    server.serve(donor)
    stream = server.oracle.stream(target)
    result = server.prefill(stream)
    assert result.fallback is None
    assert result.plan.num_reused > 8
    server.assert_first_layer(target)
    told = provenance(result)
    assert told.exact + told.reused + told.recomputed == len(stream)
    known = {part_id(part) for message in donor for part in message["content"]}
    for use, part in zip(result.media, media_parts(target), strict=True):
        assert (use.source == "kv") == (part_id(part) in known), use


def part_id(part: dict[str, Any]) -> Any:
    if part["type"] == "text":
        return part["text"]
    content = part[part["type"]]
    return content.tobytes() if part["type"] == "image" else content[0].tobytes()


def media_parts(messages: Parts) -> Parts:
    return [p for m in messages for p in m["content"] if p["type"] != "text"]


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
    # An edited request's own KV is found at its own positions again.
    again = server.serve(target)
    assert again.fallback is None
    server.prefill(server.oracle.stream(target))
    server.assert_first_layer(target)


def test_a_different_picture_is_one_replaced_run(server: Server) -> None:
    server.serve(user(say(DONOR_TEXT), see(0), say("What is it? Tell me all.")))
    target = user(say(DONOR_TEXT), see(4), say("What is it? Tell me all."))  # of the same size
    stream = server.oracle.stream(target)
    result = server.prefill(stream)
    [segment] = stream.media
    [use] = result.media
    assert use.source == "encoder"
    want = [*range(segment.start, segment.end), len(stream) - 1]
    assert result.plan.compute.tolist() == want


def test_one_pixel_is_another_picture(server: Server) -> None:
    one = picture(112, 84)
    other = one.copy()
    other.putpixel((60, 40), (1, 2, 3))
    server.serve(user({"type": "image", "image": one}, say("What is it?")))
    stream = server.oracle.stream(user({"type": "image", "image": other}, say("What is it?")))
    result = server.prefill(stream)
    [segment] = stream.media
    assert set(range(segment.start, segment.end)) <= set(result.plan.compute.tolist())
