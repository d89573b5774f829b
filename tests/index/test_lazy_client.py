"""One connection for all, one failure for all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvshare_mm.index.base import IndexUnavailableError
from kvshare_mm.index.lazy_client import LazyClient


class Server:
    """Counts connections; refuses them while down."""

    def __init__(self) -> None:
        self.up = True
        self.opened = 0
        self.closed: list[Any] = []

    def connect(self) -> int:
        self.opened += 1
        if not self.up:
            raise OSError("connection refused")
        return self.opened

    def client(self, retry_after: float) -> LazyClient:
        return LazyClient("the server", self.connect, self.closed.append, retry_after)


def use(client: LazyClient) -> Any:
    with client.use("ask") as connected:
        return connected


def test_connects_once_and_only_when_used() -> None:
    server = Server()
    client = server.client(60)
    assert server.opened == 0
    assert [use(client), use(client)] == [1, 1]
    client.close()
    assert server.closed == [1]
    with pytest.raises(IndexUnavailableError, match="closed"):
        use(client)
    client.close()
    assert server.closed == [1]


def test_after_the_wait_a_new_connection_is_made(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    client = server.client(0)
    assert use(client) == 1
    with pytest.raises(IndexUnavailableError, match="out of memory"), client.use("ask"):
        raise RuntimeError("out of memory\nand a long trace")
    assert caplog.messages == ["the server: ask: out of memory; left alone for 0 s"]
    assert server.closed == [1]
    assert use(client) == 2


def test_what_fails_because_another_thread_closed_the_client_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class RpcError(Exception):
        def details(self) -> str:
            return "Deadline Exceeded"

    server = Server()
    client = server.client(0)
    with pytest.raises(IndexUnavailableError, match="closed channel"), client.use("ask"):
        with pytest.raises(IndexUnavailableError), client.use("ask"):
            raise RpcError("terminated with:")
        assert use(client) == 2
        raise ValueError("closed channel")
    assert caplog.messages == ["the server: ask: Deadline Exceeded; left alone for 0 s"]
    assert (use(client), server.closed) == (2, [1])


def test_a_failing_disconnect_is_no_failure() -> None:
    def refuse(_: object) -> None:
        raise OSError("gone")

    client = LazyClient("the server", lambda: 1, refuse, 60)
    assert use(client) == 1
    client.close()
    with pytest.raises(IndexUnavailableError, match="closed"):
        use(client)


def test_threads_that_wait_for_a_failing_connection_do_not_try_again() -> None:
    entered, go_on, attempts = threading.Event(), threading.Event(), []

    def connect() -> None:
        attempts.append(1)
        entered.set()
        go_on.wait()
        raise OSError("timeout")

    client = LazyClient("the server", connect, lambda _: None, 60)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(use, client)]
        entered.wait()
        asked += [pool.submit(use, client) for _ in range(3)]
        go_on.set()
    assert all(isinstance(each.exception(), IndexUnavailableError) for each in asked)
    assert len(attempts) == 1
