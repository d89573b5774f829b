"""Pictures and sound of a long list: refused with a reason or answered, in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kvshare_mm import KVShare

from ...hostile_media import good_pictures, good_sounds, pictures, sounds
from .conftest import Running, image_part, serving, sound_part
from .test_hostile_bodies import INSIDE

# For a file that is never answered: a decoder has a deadline of its own, see `media_deadline_s`.
_TIMEOUT_S = 60.0
_PARTS = 4


@pytest.fixture(scope="module")
def seeing() -> Iterator[Running]:
    with serving(lambda: KVShare("tiny-vl", embedder=None, reuse="off")) as running:
        yield running


@pytest.fixture(scope="module")
def hearing() -> Iterator[Running]:
    with serving(lambda: KVShare("tiny-audio", embedder=None, reuse="off")) as running:
        yield running


def _body(part: dict[str, Any]) -> dict[str, Any]:
    parts = [part, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}


def wrong(running: Running, parts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What was wrong with replies, by the file's name."""
    found = {}
    with httpx2.Client(base_url=running.url, timeout=_TIMEOUT_S) as client:
        for name, part in parts.items():
            try:
                reply = client.post("/v1/chat/completions", json=_body(part))
            except httpx2.HTTPError as error:
                found[name] = repr(error)
                continue
            if reply.status_code not in {200, 400}:
                found[name] = f"status {reply.status_code}: {reply.text[:200]}"
            elif reply.status_code == 400:
                error = reply.json()["error"]
                place = f"messages[0].content[0].{part['type']}"
                if error["param"] != place or not error["message"].startswith(place):
                    found[name] = f"not told where: {reply.text[:200]}"
                elif INSIDE.search(reply.text) or len(reply.content) > 2000:
                    found[name] = f"too much told: {reply.text[:300]}"
    return found


def test_the_lists_are_long() -> None:
    assert len(pictures()) >= 120
    assert len(sounds()) >= 120


def test_good_files_are_answered(seeing: Running, hearing: Running) -> None:
    """Otherwise everything could be refused."""
    for running, parts in (
        (seeing, map(image_part, good_pictures().values())),
        (hearing, map(sound_part, good_sounds().values())),
    ):
        for part in parts:
            reply = running.ask("POST", "/v1/chat/completions", json=_body(part))
            assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("part", range(_PARTS))
def test_no_picture_is_a_server_error(seeing: Running, part: int) -> None:
    mine = {n: image_part(c) for i, (n, c) in enumerate(pictures().items()) if i % _PARTS == part}
    assert wrong(seeing, mine) == {}
    assert seeing.chat("What is it?").status_code == 200


@pytest.mark.parametrize("part", range(_PARTS))
def test_no_sound_is_a_server_error(hearing: Running, part: int) -> None:
    mine = {n: sound_part(c) for i, (n, c) in enumerate(sounds().items()) if i % _PARTS == part}
    assert wrong(hearing, mine) == {}
    assert hearing.chat("What is it?").status_code == 200
