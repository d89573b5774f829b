"""Which URLs name replicas, and those that come and go with a name's addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kvshare_mm.apps.router import fleet as fleet_module
from kvshare_mm.apps.router.fleet import Fleet, addresses, fleet_of
from kvshare_mm.errors import ConfigError

from ...helpers import until
from .conftest import Route, Upstreams


@pytest.mark.parametrize(
    "urls",
    ["", ",", "10.0.0.1:8000", "ftp://a", "http://", "http://a/x", "http://u:p@a", "http://a?b",
     "http://a#b", "http://a:b", "http://a:99999", "http://a,http://a", "http://a b",
     "http://a\r\nx: y", "http://[::1", "dns+", "dns+a:80", "dns+https://a", "dns+dns+http://a",
     "dns+http://a,dns+http://a", "dns+http://a/x"],
)  # fmt: skip
def test_what_is_no_replica_is_refused_at_the_start(urls: str) -> None:
    with pytest.raises(ConfigError, match="--replicas"):
        fleet_of(urls)


def test_replicas_keep_their_order_and_their_ports() -> None:
    assert numbered(fleet_of("http://a:1/v1, https://[::1]:2/ ,http://c")) == {
        1: "http://a:1", 2: "https://[::1]:2", 3: "http://c",
    }  # fmt: skip


def numbered(fleet: Fleet) -> dict[int, str]:
    return {r.number: r.origin for r in fleet.replicas}


def test_they_come_and_go_with_the_addresses_of_a_name() -> None:
    answers: list[Sequence[str] | Exception] = []

    async def lookup(name: str) -> Sequence[str]:
        assert name == "http://pods:8000"
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return [f"http://10.0.0.{host}:8000" for host in answer]

    async def after(*answer: Sequence[str] | Exception) -> dict[int, str]:
        answers[:] = answer
        await fleet.resolve()
        return {n: origin.removesuffix(":8000")[-1] for n, origin in numbered(fleet).items()}

    async def steps() -> None:
        assert await after(OSError("no such name")) == {1: "a"}
        assert await after("63") == {1: "a", 2: "3", 3: "6"}
        first = fleet.replicas[1]
        assert await after("36") == {1: "a", 2: "3", 3: "6"}
        assert fleet.replicas[1] is first and behind is fleet.replicas
        assert await after(TimeoutError()) == {1: "a", 2: "3", 3: "6"}  # nobody says otherwise
        assert await after("69") == {1: "a", 3: "6", 2: "9"}  # restarted elsewhere: its number
        assert await after("") == {1: "a"}

    fleet = fleet_of("http://a:8000,dns+http://pods:8000", lookup)
    behind = fleet.replicas
    asyncio.run(steps())


@pytest.mark.parametrize(
    ("name", "found"),
    [("http://127.0.0.1:81", ["http://127.0.0.1:81"]), ("http://[::1]", ["http://[::1]:80"]),
     ("http://localhost:82", ["http://127.0.0.1:82"])],
)  # fmt: skip
def test_addresses_of_this_machine(name: str, found: list[str]) -> None:
    assert asyncio.run(addresses(name)) == found


def test_a_name_that_cannot_be_one_is_like_one_that_nobody_knows() -> None:
    fleet = fleet_of("http://a,dns+http://a..b")
    asyncio.run(fleet.resolve())
    assert numbered(fleet) == {1: "http://a"}


def test_a_router_follows_a_name(
    upstreams: Upstreams, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[str] = []

    async def lookup(_: str) -> list[str]:
        return there

    monkeypatch.setattr(fleet_module, "_LOOKUP_S", 0.02)
    monkeypatch.setattr(fleet_module, "addresses", lookup)
    behind = upstreams(2)
    routed = route(["dns+http://pods:8000"])
    assert routed.ask("GET", "/health").status_code == 503
    for number, upstream in enumerate(behind, 1):
        there[:] = [upstream.url]
        until(lambda: [r.origin for r in routed.replicas if r.healthy] == there)
        assert routed.chat("hello").headers["x-kvshare-replica"] == "1"
        assert [len(u.asked) for u in behind] == [1, number - 1]
        assert routed.metric('kvshare_router_up{replica="1"}') == 1
    there[:] = []
    until(lambda: not routed.replicas)
    assert "kvshare_router_up{" not in routed.ask("GET", "/metrics").text


def test_an_address_that_cannot_be_asked_is_told_once_and_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def lookup(name: str) -> Sequence[str]:
        return ["http://[fe80::1%eth0]:80", "http://10.0.0.1:80"]

    fleet = Fleet([], ["http://x:80"], lookup)
    for _ in range(2):
        asyncio.run(fleet.resolve())
    assert numbered(fleet) == {1: "http://10.0.0.1:80"}
    assert caplog.text.count("cannot be asked") == 1
