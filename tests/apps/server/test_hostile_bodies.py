"""Bodies of a long list: refused with a reason or answered, never an error of the server."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx2
import pytest

from .conftest import ADMIN, Running
from .hostile_bodies import Sent, sent

# What a reply would hold that tells of the machine or the program behind it.
INSIDE = re.compile(
    r"Traceback|File \"|site-packages|\.py\b|/home/|/root/|/tmp/|/usr/|0x[0-9a-f]{8}"
)
_LONGEST_ERROR = 4096
_PARTS = 8  # so that a broken server fails one part after the other, each within its time


@pytest.fixture(scope="module")
def client(shared: Running) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx2.Client(base_url=shared.url, headers=headers, timeout=60) as made:
        yield made


def complaint(asked: Sent, reply: httpx2.Response) -> str | None:
    """What is wrong with a reply, or None."""
    if reply.status_code == 200:
        if not asked.legal:
            return "it was taken"
        if reply.headers["content-type"].startswith("text/event-stream"):
            failed = any(sign in reply.text for sign in ('"internal_error"', '"response.failed"'))
            return "an error came in the stream" if failed else None
        return None
    if not 400 <= reply.status_code < 500:
        return f"status {reply.status_code}"
    if set(reply.json()) != {"error"}:
        return "not OpenAI's shape"
    error = reply.json()["error"]
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return "not OpenAI's shape"
    if len(reply.content) > _LONGEST_ERROR:
        return f"{len(reply.content)} bytes of an error"
    # What a client sent may come back to it; what it did not send may not.
    for found in INSIDE.findall(reply.text):
        if found.encode() not in asked.content and found not in asked.path:
            return f"it tells {found}"
    return None


@pytest.mark.parametrize("part", range(_PARTS))
def test_no_body_is_a_server_error(shared: Running, client: httpx2.Client, part: int) -> None:
    mine = [asked for i, asked in enumerate(sent()) if i % _PARTS == part]
    assert len(mine) * _PARTS >= 300
    wrong = {}
    for asked in mine:
        try:
            reply = client.post(asked.path, content=asked.content, headers=asked.headers)
        except httpx2.HTTPError as error:
            wrong[asked.name] = repr(error)
            continue
        if (said := complaint(asked, reply)) is not None:
            wrong[asked.name] = f"{said}: {reply.text[:200]}"
    assert not wrong, f"{len(wrong)} of {len(mine)}:\n" + "\n".join(
        f"{name}: {said}" for name, said in list(wrong.items())[:40]
    )
    reply = shared.chat("The quick brown fox")
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["finish_reason"] in {"length", "stop"}
