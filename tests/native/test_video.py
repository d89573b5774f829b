"""Prefill with video: frames that are known are reused wherever they stand, and turned right."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..media_models import FILMS
from ..media_oracle import Oracle
from ..modalities.media import film
from .media_server import ATOL, DONOR_TEXT, OTHER_NS, Oracles, Parts, Server, say, see, user

FRAMES = film(12)
ASKED = "What is it? Tell me all."


def prompt(frames: list[Any], question: str = ASKED, fps: float = 2.0) -> Parts:
    return user(say(DONOR_TEXT), {"type": "video", "video": frames, "fps": fps}, say(question))


def assert_exact_is_full(server: Server, messages: Parts) -> int:
    """What is exact of it may be none; all of it is what a full prefill gives."""
    result = server.prefill(server.oracle.stream(messages), reuse="exact")
    full = server.oracle.full(server.oracle.inputs(messages))
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)
    for got, want in zip(server.runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, : len(full.logits)], want, atol=ATOL, rtol=0)
    return result.plan.num_exact


@pytest.fixture(params=FILMS)
def oracle(request: pytest.FixtureRequest, oracles: Oracles) -> Oracle:
    return oracles(request.param)


# Frames, frames a second, and what becomes of each group.
EDITS: dict[str, tuple[list[Any], float, str]] = {
    "the same": (FRAMES[:8], 2.0, "kv kv kv kv"),
    "the oldest dropped": (FRAMES[2:8], 2.0, "kv kv kv"),
    "the oldest half dropped": (FRAMES[4:8], 2.0, "kv kv"),
    "a second later": (FRAMES[2:10], 2.0, "kv kv kv encoder"),
    "longer": (FRAMES[:10], 2.0, "kv kv kv kv encoder"),
    "one in the middle changed": ([*FRAMES[:3], FRAMES[11], *FRAMES[4:8]], 2.0, "kv encoder kv kv"),
    "the last one missing": (FRAMES[:7], 2.0, "kv kv kv encoder"),
    "one frame later": (FRAMES[1:8], 2.0, "encoder encoder encoder encoder"),
    "a slow one, the oldest dropped": (FRAMES[2:8], 0.3, "kv kv kv"),
    "of a fraction a second, the oldest dropped": (FRAMES[2:8], 5.3, "kv kv kv"),
}


@pytest.mark.parametrize("name", EDITS)
def test_groups_of_frames_that_are_known_are_not_computed(oracle: Oracle, name: str) -> None:
    frames, fps, become = EDITS[name]
    server = Server(oracle)
    first = server.serve(prompt(FRAMES[:8], fps=fps))
    assert [use.source for use in first.media] == ["encoder"] * 4
    target = prompt(frames, fps=fps)
    result = server.prefill(oracle.stream(target))
    assert result.fallback is None
    assert " ".join(use.source for use in result.media) == become
    assert server.runs == 4 + become.count("encoder")
    kept = result.plan.kept
    assert [bool(kept[use.start : use.end].all()) for use in result.media] == [
        source == "kv" for source in become.split()
    ]
    server.assert_first_layer(target)
    # An edited request's own KV is found at its own positions again.
    server.serve(target)
    server.prefill(oracle.stream(target))
    server.assert_first_layer(target)
    assert assert_exact_is_full(server, target) > len(DONOR_TEXT)


def test_another_question_about_a_video_is_an_exact_prefix(oracle: Oracle) -> None:
    server = Server(oracle)
    server.serve(prompt(FRAMES[:8]))
    target = prompt(FRAMES[:8], "And what colour does it have?")
    *_, last = oracle.stream(target).media
    assert assert_exact_is_full(server, target) > last.end
    assert (server.runs, server.hits) == (4, 0)


def test_what_was_seen_at_another_place_is_not_encoded_again(oracle: Oracle) -> None:
    """Exact prefixes alone, of which there is none."""
    server = Server(oracle)
    server.serve(prompt(FRAMES[:8]))
    result = server.prefill(
        oracle.stream(user(say("Dear shop. "), *prompt(FRAMES[2:10])[0]["content"])), reuse="exact"
    )
    assert [use.source for use in result.media] == ["features"] * 3 + ["encoder"]
    assert (server.runs, server.hits) == (5, 3)


def test_frames_that_follow_at_another_speed_are_others(oracle: Oracle) -> None:
    """Where the model is told the speed."""
    server = Server(oracle)
    server.serve(prompt(FRAMES[:8]))
    target = prompt(FRAMES[:8], fps=1.0)
    result = server.prefill(oracle.stream(target))
    source = (
        "encoder" if hasattr(oracle.reference.config.vision_config, "tokens_per_second") else "kv"
    )
    assert {use.source for use in result.media} == {source}
    server.assert_first_layer(target)
    assert_exact_is_full(server, target)


def test_two_videos_and_a_picture_change_places(oracle: Oracle) -> None:
    server = Server(oracle)
    one = {"type": "video", "video": FRAMES[:4], "fps": 2.0}
    two = {"type": "video", "video": FRAMES[6:12], "fps": 1.0}
    server.serve(user(one, say(" or this one: "), see(1), say(" and then "), two, say(ASKED)))
    target = user(two, say(" and then "), one, say(" or this one: "), see(1), say(ASKED))
    result = server.prefill(oracle.stream(target))
    assert [use.source for use in result.media] == ["kv"] * 6
    assert server.runs == 6
    server.assert_first_layer(target)
    assert_exact_is_full(server, target)


def test_a_tenants_video_is_its_own(oracle: Oracle) -> None:
    server = Server(oracle)
    server.serve(prompt(FRAMES[:4]))
    result = server.prefill(oracle.stream(prompt(FRAMES[:4])), OTHER_NS)
    assert [use.source for use in result.media] == ["encoder"] * 2
    assert result.plan.runs == ()


@pytest.mark.parametrize("family", FILMS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_is_turned_right(oracles: Oracles, family: str, data: st.DataObject) -> None:
    oracle = oracles(family)
    server = Server(oracle)
    fps = data.draw(st.sampled_from([0.4, 1.0, 3.1, 24.0]))
    frames = st.lists(st.integers(0, 5), min_size=1, max_size=8)

    def cut() -> dict[str, Any]:
        shown = [FRAMES[i] for i in data.draw(frames)]
        return {"type": "video", "video": shown, "fps": fps}

    server.serve(user(say("See: "), cut(), say(" and "), cut(), say(ASKED)))
    target = user(say(data.draw(st.sampled_from(["See: ", "Now see: "]))), cut(), say(ASKED))
    result = server.prefill(oracle.stream(target))
    assert result.fallback is None
    server.assert_first_layer(target)


def test_where_axes_are_not_known_what_moves_apart_is_computed(oracles: Oracles) -> None:
    oracle = copy.copy(oracles("qwen2_5_vl"))
    assert oracle.loaded.rotary is not None
    oracle.loaded = replace(oracle.loaded, rotary=replace(oracle.loaded.rotary, axes=None))
    server = Server(oracle)
    server.serve(prompt(FRAMES[:8]))
    target = prompt(FRAMES[2:8])
    result = server.prefill(oracle.stream(target))
    assert result.fallback is None
    assert [use.source for use in result.media] == ["features"] * 3
    server.assert_first_layer(target)
