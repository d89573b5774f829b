"""Replicas that say they are healthy and fail requests."""

from __future__ import annotations

from typing import Any

import pytest

from kvshare_mm.apps.router import replicas as replicas_module

from ...helpers import until
from .conftest import Answer, Route, Upstreams, dropping, refusing


async def silent(_: Any, scope: Any, send: Any, receive: Any) -> None:
    await receive()  # until the router has gone


async def only_a_head(_: Any, scope: Any, send: Any, receive: Any) -> None:
    headers = [(b"content-length", b"9")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    raise ConnectionError("no more comes")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (refusing(500, b"out of memory"), 500),
        (refusing(503, b"no upstream"), 503),
        (silent, 504),
        (only_a_head, 200),  # asked again elsewhere
    ],
)
def test_a_replica_that_is_healthy_and_fails_all_requests_draws_none_away(
    upstreams: Upstreams,
    route: Route,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    status: int,
) -> None:
    monkeypatch.setattr(replicas_module, "_REST_S", 3600.0)
    failing, good = behind = upstreams(2)
    failing.answer = answer
    routed = route([u.url for u in behind], request_timeout_s=2.0)
    found = [routed.chat(f"{number} nothing alike").status_code for number in range(60)]
    assert len(failing.asked) == 5 and (status == 200 or found.count(status) == 5)
    assert found[-20:] == [200] * 20 and found.count(200) == len(good.asked)
    assert routed.metric('kvshare_router_up{replica="1"}') == 0
    # Where it is the only one that is left, it is asked.
    routed.replicas[1:] = []
    assert routed.chat("hello").status_code == (503 if status == 200 else status)
    assert len(failing.asked) == 6


def test_two_replicas_that_drop_all_requests_draw_none_away(
    upstreams: Upstreams, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "_REST_S", 3600.0)
    [good] = upstreams(1)
    made = [dropping() for _ in range(2)]
    routed = route([*(url for url, _, _ in made), good.url])
    found = [routed.chat(f"{number} nothing alike").status_code for number in range(60)]
    assert [len(dropped) for _, dropped, _ in made] == [5, 5]
    assert found.count(502) <= 5 and found[-20:] == [200] * 20
    for _, _, end in made:
        end()


def test_a_replica_that_was_gone_and_is_back_has_failed_nothing(
    upstreams: Upstreams, route: Route
) -> None:
    [one] = upstreams(1)
    routed = route([one.url])
    one.answer = refusing(500, b"")
    for _ in range(5):
        routed.chat("hi")
    assert routed.metric('kvshare_router_up{replica="1"}') == 0
    one.health = 503
    until(lambda: not routed.replicas[0].healthy)
    one.health = 200
    until(lambda: routed.replicas[0].healthy)
    assert routed.metric('kvshare_router_up{replica="1"}') == 1


def test_a_long_refusal_is_none_to_the_client_while_another_can_be_asked(
    upstreams: Upstreams, route: Route
) -> None:
    full, free = behind = upstreams(2)
    full.answer = refusing(503, b"x" * 70_000, (b"retry-after", b"3"))
    routed = route([u.url for u in behind])
    assert {routed.chat(f"{number} nothing alike").status_code for number in range(20)} == {200}
    assert full.asked and len(free.asked) == 20
