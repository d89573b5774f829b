"""URLs of a long list, sent in a chat: always status 400, never a connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from kvshare_mm import KVShare
from kvshare_mm.modalities.fetch import FetchPolicy

from ...hostile_urls import NAMES, URLS, Network
from .conftest import Running, serving


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with pytest.MonkeyPatch.context() as patch:
        yield Network(patch)


@pytest.fixture(scope="module")
def asked(
    tiny_folder: Path, network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, httpx2.Client]]:
    """A server that would fetch over http and from a folder too, and a client of it."""
    policy = FetchPolicy(file_roots=(tmp_path_factory.mktemp("media"),), max_bytes=4000)
    with (
        serving(lambda: KVShare(str(tiny_folder), embedder=None), fetch=policy) as running,
        httpx2.Client(base_url=running.url, timeout=30) as client,
    ):
        yield running, client


def test_the_list_is_long() -> None:
    assert len(URLS) >= 120


@pytest.mark.parametrize("url", URLS, ids=lambda url: ascii(url)[1:50])
def test_no_url_is_fetched(
    asked: tuple[Running, httpx2.Client], network: Network, url: str
) -> None:
    network.connections.clear()
    part = {"type": "image_url", "image_url": {"url": url}}
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]})
    reply = asked[1].post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "messages[0].content[0].image_url"
    assert error["message"].startswith(error["param"]) and len(error["message"]) < 400
    for name, addresses in NAMES.items():
        assert not (name in url and any(address in error["message"] for address in addresses))
    assert network.connections == []


def test_requests_are_answered_afterwards(asked: tuple[Running, httpx2.Client]) -> None:
    reply = asked[0].chat("The quick brown fox")
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] is not None
