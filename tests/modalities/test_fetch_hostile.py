"""No URL of a long list is fetched, sent or redirected to, and none opens a connection."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpcore2
import pytest

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.fetch import FetchPolicy, MediaFetcher

from ..hostile_urls import INSIDE, ODD, Network


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdecimal()


def _ids(url: str) -> str:
    return ascii(url)[1:50]


@pytest.mark.parametrize("host", [*INSIDE, *ODD], ids=_ids)
def test_no_redirect_leads_there(network: Network, host: str) -> None:
    location = f"http://{host}/a.png".encode("utf-8", "surrogatepass")
    for byte in b"\r\n\0":  # a header cannot hold them
        location = location.replace(bytes([byte]), b"%%%02x" % byte)
    network.answers[b"/start"] = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % location
    with pytest.raises(InvalidRequestError):
        MediaFetcher().fetch("http://public.example/start")
    assert {address for address, _ in network.connections} == {network.public}
    names = {name for name in network.resolved if not _is_address(name)}
    assert names <= {"public.example", *network.names}


@pytest.mark.parametrize(
    "location",
    [b"", b"http://[::1", b"//[", b"http://a:b:c/", b"//", b"\xff\xfe", b"?\xed\xa0\x80",
     b"a" * 9000, b"file:///etc/passwd", b"data:,x", b"http:", b"//user@b.example/",
     b"\\\\b.example\\x", b"ftp://b.example/", b"http://user@b.example/", b"//192.168.0.1/x"],
)  # fmt: skip
def test_a_redirect_to_nothing_is_refused(network: Network, location: bytes) -> None:
    network.answers[b"/start"] = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % location
    with pytest.raises(InvalidRequestError):
        MediaFetcher(FetchPolicy(max_redirects=2)).fetch("http://public.example/start")
    assert {address for address, _ in network.connections} == {network.public}


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\xff: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 999 \xff\r\n\r\n",
        b"HTTP/1.1 302 Found\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\0\0",
        b"\0" * 5000,
        b"",
    ],
    ids=lambda head: ascii(head[:60]),
)
def test_a_site_that_speaks_no_http_is_refused(network: Network, head: bytes) -> None:
    network.answers[b"/start"] = head
    with pytest.raises(InvalidRequestError):
        MediaFetcher().fetch("http://public.example/start")


def test_what_is_inside_cannot_be_told_from_what_is_not_there(network: Network) -> None:
    """A name service of inside knows names that nobody else should hear of; so do ports."""
    hosts = {
        "nowhere.example": [],
        "inside.example": ["10.0.0.7"],
        "loop.example": ["127.0.0.1"],
        "azure.example": ["168.63.129.16"],
    }
    network.names.update(hosts)
    said = set()
    for host in hosts:
        for port in ("", ":22", ":8000", ":65535"):
            with pytest.raises(InvalidRequestError) as refused:
                MediaFetcher().fetch(f"http://{host}{port}/")
            said.add(str(refused.value).replace(f"{host}{port}", "HOST").replace(host, "HOST"))
            assert not any(address in str(refused.value) for a in hosts.values() for address in a)
    assert len(said) == 1
    assert network.connections == []


@pytest.mark.parametrize(
    "url",
    ["http://public.example/start", "HTTP://Public.Example.:80/start", "http://8.8.8.8/start",
     "http://[2606:4700:4700::1111]:8080/start", "http://[64:ff9b::808:808]/start",
     "http://bücher.example/start", "http://a_b.c-d.example:/start", "http://public.example/start#x"],
)  # fmt: skip
def test_what_is_public_is_fetched(network: Network, url: str) -> None:
    network.answers[b"/start"] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    assert MediaFetcher().fetch(url) == b"hi"
    assert len(network.connections) == 1


def test_metadata_of_a_cloud_is_refused_in_closed_networks_too(network: Network) -> None:
    policy = FetchPolicy(allow_private=True)
    network.answers[b"/start"] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    assert MediaFetcher(policy).fetch("http://inside.example/start") == b"hi"
    for host in ("169.254.169.254", "azure.example", "[fd00:ec2::254]", "metadata.google.internal"):
        with pytest.raises(InvalidRequestError, match="not public"):
            MediaFetcher(policy).fetch(f"http://{host}/start")
    assert [address for address, _ in network.connections] == ["10.0.0.7"]


def test_the_network_of_these_tests_is_what_connects(network: Network) -> None:
    """Otherwise no test here would say anything."""

    async def connect() -> Any:
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", 9)

    with pytest.raises(httpcore2.ConnectError):
        asyncio.run(connect())
    assert network.connections == [("127.0.0.1", 9)]
    assert socket.getaddrinfo("other.example", 80)[0][4][0] == network.public
