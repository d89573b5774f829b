"""Sessions, their files, and attempts to log in, on a clock of the tests."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest

from kvshare_mm.apps.desk.attempts import Attempts
from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.desk.uploads import Uploads
from kvshare_mm.apps.desk.visitors import Visitor, Visitors
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.keys import Caller

from ...helpers import Clock


class Desk:
    """Visitors, their files, and the keys that are known."""

    def __init__(self, **limits: float) -> None:
        self.clock = Clock()
        self.limits = DeskLimits(**limits)  # type: ignore[arg-type]
        self.uploads = Uploads(self.limits, self.clock)
        self.keys: dict[str | None, Caller] = {"a": Caller("shop-a"), "b": Caller("shop-b")}
        self.visitors = Visitors(self.limits, self.uploads, self.keys.get, self.clock)

    def enter(self, key: str = "a") -> tuple[str, Visitor]:
        cookie = self.visitors.enter(self.keys[key], key)
        visitor = self.visitors.of_cookie(cookie)
        assert visitor is not None
        return cookie, visitor


def test_files_are_kept_for_who_sent_them() -> None:
    desk = Desk()
    one = desk.uploads.keep("one", b"photo", "image/png")
    assert one == desk.uploads.keep("one", b"photo", "image/png")
    assert one != desk.uploads.keep("two", b"photo", "image/png")
    assert desk.uploads.get("one", one) is not None and desk.uploads.get("two", one) is None
    assert desk.uploads.total_bytes == 10
    desk.uploads.forget("one")
    assert desk.uploads.get("one", one) is None and desk.uploads.total_bytes == 5


def test_files_are_bounded_one_by_one_by_visitor_and_in_all() -> None:
    desk = Desk(upload_bytes=10, visitor_bytes=25, all_bytes=40)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        desk.uploads.keep("one", bytes(11), "x")
    tokens = [desk.uploads.keep("one", bytes([n]) * 10, "x") for n in range(3)]
    assert [desk.uploads.get("one", t) is not None for t in tokens] == [False, True, True]
    small = desk.uploads.keep("two", b"small", "x")
    for n in range(3):
        desk.uploads.keep("three", bytes([n]) * 8, "x")
    # Who holds most makes room, not who holds little.
    assert desk.uploads.total_bytes <= 40
    assert desk.uploads.get("two", small) is not None


def test_one_tenant_cannot_push_out_the_files_of_another() -> None:
    desk = Desk(upload_bytes=10, visitor_bytes=30, all_bytes=100)
    large = desk.uploads.keep("of b", b"x" * 10, "x", "b")
    for i in range(50):  # many visitors, each with less than the other tenant's one
        desk.uploads.keep(f"of a, {i}", bytes([i]) * 4, "x", "a")
    assert desk.uploads.get("of b", large) is not None
    assert 80 < desk.uploads.total_bytes <= 100


def test_one_tenant_cannot_take_all_streams() -> None:
    desk = Desk(streams=2, all_streams=4)
    crowd = [desk.enter("a")[1] for _ in range(4)]
    _, other = desk.enter("b")

    async def scene() -> None:
        async with AsyncExitStack() as stack:
            for visitor in crowd * 2:
                with suppress(ApiError):
                    await stack.enter_async_context(desk.visitors.streaming(visitor))
            assert sum(len(visitor.streams) for visitor in crowd) == 4
            for _ in range(2):
                await stack.enter_async_context(desk.visitors.streaming(other))
            assert len(other.streams) == 2
            with pytest.raises(ApiError, match="too many pages"):
                await stack.enter_async_context(desk.visitors.streaming(crowd[0]))

    asyncio.run(scene())


def test_one_tenant_cannot_push_out_the_sessions_of_another() -> None:
    desk = Desk(visitors=3)
    cookie, _ = desk.enter("b")
    for _ in range(10):
        desk.enter("a")
    assert desk.visitors.of_cookie(cookie) is not None


def test_files_are_dropped_in_time_and_with_their_session() -> None:
    desk = Desk(upload_s=100)
    cookie, visitor = desk.enter()
    old = desk.uploads.keep(visitor.name, b"old", "x")
    desk.clock.now += 60
    new = desk.uploads.keep(visitor.name, b"new", "x")
    desk.clock.now += 60
    desk.visitors.sweep()
    assert desk.uploads.get(visitor.name, old) is None
    assert desk.uploads.get(visitor.name, new) is not None
    desk.visitors.leave(cookie)
    assert desk.uploads.total_bytes == 0


def test_a_session_ends_with_its_key_and_in_time() -> None:
    desk = Desk(idle_s=100, lifetime_s=250)
    cookie, visitor = desk.enter("b")
    desk.visitors.claim(visitor, "page")
    desk.keys["b"] = Caller("shop-a")  # the key is another tenant's now
    with pytest.raises(ApiError, match="has ended"):
        desk.visitors.of_page("page")
    assert desk.visitors.of_cookie(cookie) is None
    idle, _ = desk.enter("a")
    desk.clock.now += 101
    assert desk.visitors.of_cookie(idle) is None
    busy, _ = desk.enter("a")
    for _ in range(4):
        desk.clock.now += 60
        assert desk.visitors.of_cookie(busy) is not None
    desk.clock.now += 60
    assert desk.visitors.of_cookie(busy) is None


def test_sessions_and_pages_are_bounded() -> None:
    desk = Desk(visitors=2, pages=2)
    first, _ = desk.enter()
    second, visitor = desk.enter()
    assert desk.visitors.of_cookie(first) is not None
    third, _ = desk.enter()
    assert [desk.visitors.of_cookie(c) is not None for c in (first, second, third)] == [
        True,
        False,
        True,
    ]
    visitor = desk.visitors.of_cookie(first)  # type: ignore[assignment]
    for page in ("one", "two", "three"):
        desk.visitors.claim(visitor, page)
    with pytest.raises(ApiError):
        desk.visitors.of_page("one")
    assert desk.visitors.of_page("three") is visitor


def test_attempts_are_counted_by_address_and_in_all() -> None:
    clock = Clock()
    attempts = Attempts(DeskLimits(logins=3, all_logins=5), clock)
    assert [attempts.begin("192.0.2.1") for _ in range(3)] == [0, 0, 0]
    assert attempts.begin("192.0.2.1") == pytest.approx(20)
    assert attempts.begin("192.0.2.2") == 0
    attempts.succeeded("192.0.2.2")
    assert [attempts.begin(f"192.0.2.{n}") for n in (3, 4)] == [0, 0]
    assert attempts.begin("192.0.2.5") == pytest.approx(12)
    clock.now += 20
    assert attempts.begin("192.0.2.1") == 0
    clock.now += 600
    # Nobody has fewer than 2**64 addresses of IPv6.
    assert [attempts.begin(f"2001:db8::{n}") for n in range(3)] == [0, 0, 0]
    assert attempts.begin("2001:db8::ffff") > 0
