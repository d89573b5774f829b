"""Fetching media by URL: what is refused, what is limited, what arrives."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities import fetch as fetch_module
from kvshare_mm.modalities.fetch import FetchPolicy, MediaFetcher
from kvshare_mm.modalities.sources import MediaSources

_PICTURE = b"\x89PNG" + bytes(range(256)) * 4


class _Pages(BaseHTTPRequestHandler):
    """A site with good and bad pages."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name, _, rest = self.path.lstrip("/").partition("/")
        try:
            getattr(self, f"page_{name}")(rest)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def page_picture(self, _: str) -> None:
        self.answer(200, _PICTURE)

    def page_large(self, size: str) -> None:
        self.answer(200, bytes(int(size)))

    def page_to(self, target: str) -> None:
        self.answer(302, b"", ("Location", target))

    def page_loop(self, _: str) -> None:
        self.answer(302, b"", ("Location", "/loop"))

    def page_chain(self, left: str) -> None:
        self.answer(
            307, b"", ("Location", f"/chain/{int(left) - 1}" if left != "1" else "/picture")
        )

    def page_missing(self, _: str) -> None:
        self.answer(404, b"no")

    def page_packed(self, _: str) -> None:
        self.answer(200, b"\x1f\x8b", ("Content-Encoding", "gzip"))

    def page_boast(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10**12))
        self.end_headers()

    def page_endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while True:
            self.wfile.write(bytes(4096))

    def page_drip(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        for _i in range(100):
            self.wfile.write(b".")
            self.wfile.flush()
            self.server.stop.wait(0.05)  # type: ignore[attr-defined]

    def page_silent(self, _: str) -> None:
        self.close_connection = True
        self.server.stop.wait(10)  # type: ignore[attr-defined]

    def page_short(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"short")
        self.close_connection = True

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for header in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Site:
    def __init__(self) -> None:
        self.asked: list[str] = []
        handler = type("Pages", (_Pages,), {"asked": self.asked})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.stop = threading.Event()  # type: ignore[attr-defined]
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def __call__(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    def close(self) -> None:
        self.server.stop.set()  # type: ignore[attr-defined]
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[_Site]:
    made = _Site()
    yield made
    made.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """A name service: host to its answers, one after the other; the last one stays."""
    answers: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host not in answers:
            return real(host, port, *rest, **options)
        left = answers[host]
        now = left.pop(0) if len(left) > 1 else left[0]
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
            for a in now
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return answers


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test site counts as public; everything else is judged as always."""
    real = fetch_module.is_public
    monkeypatch.setattr(fetch_module, "is_public", lambda a: a == "127.0.0.1" or real(a))


OPEN = FetchPolicy(allow_private=True, max_bytes=5000, timeout_s=60)


@pytest.mark.usefixtures("public")
def test_a_name_that_changes_its_address_gains_nothing(
    site: _Site, names: dict[str, list[list[str]]]
) -> None:
    names["moving.example"] = [["127.0.0.1"], ["10.0.0.1"]]
    with pytest.raises(InvalidRequestError, match="not public"):
        MediaFetcher().fetch(site("to//picture", host="moving.example"))
    assert site.asked == ["/to//picture"]


def test_only_allowed_domains_are_asked(site: _Site, names: dict[str, list[list[str]]]) -> None:
    for host in ("cdn.shop.example", "shop.example", "evilshop.example"):
        names[host] = [["127.0.0.1"]]
    fetcher = MediaFetcher(FetchPolicy(allow_private=True, domains=frozenset({"Shop.example"})))
    assert fetcher.fetch(site("picture", host="cdn.shop.example")) == _PICTURE
    assert fetcher.fetch(site("picture", host="SHOP.example")) == _PICTURE
    asked = len(site.asked)
    for host in ("evilshop.example", "127.0.0.1", "shop.example.evil.example"):
        with pytest.raises(InvalidRequestError, match="not allowed"):
            fetcher.fetch(site("picture", host=host))
    assert len(site.asked) == asked
    with pytest.raises(InvalidRequestError, match="not allowed"):
        fetcher.fetch(site("to/http://evilshop.example/", host="shop.example"))


def test_a_picture_arrives(site: _Site) -> None:
    assert MediaFetcher(OPEN).fetch(site("picture")) == _PICTURE
    assert MediaFetcher(OPEN).fetch(site("chain/3")) == _PICTURE


def test_a_picture_arrives_inside_an_event_loop(site: _Site) -> None:
    async def both() -> tuple[bytes, bytes]:
        return await MediaFetcher(OPEN).afetch(site("picture")), MediaFetcher(OPEN).fetch(
            site("picture")
        )

    assert asyncio.run(both()) == (_PICTURE, _PICTURE)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("endless", "bytes"),
        ("boast", "bytes"),
        ("loop", "redirects"),
        ("chain/4", "redirects"),
        ("missing", "404"),
        ("packed", "packed"),
        ("short", "could not be fetched"),
    ],
)
def test_pages_that_are_no_picture_are_refused(site: _Site, page: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        MediaFetcher(OPEN).fetch(site(page))


@pytest.mark.usefixtures("public")
def test_the_bound_on_files_is_that_of_urls_too(
    site: _Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So much takes seconds on a busy machine.
    policy = partial(FetchPolicy, timeout_s=60)
    monkeypatch.setattr(fetch_module, "FetchPolicy", policy)
    large = FetchPolicy().max_bytes + 1
    sources = MediaSources(max_bytes=large)
    assert len(sources.read(site(f"large/{large}"), "here")) == large
    assert len(sources.read("data:," + "a" * large, "here")) == large
    for url in (site(f"large/{large + 1}"), site("endless"), "data:," + "a" * (large + 1)):
        with pytest.raises(InvalidRequestError, match=f"^here.*more than {large} bytes"):
            sources.read(url, "here")


@pytest.mark.usefixtures("public")
def test_no_more_than_the_bound_is_fetched(site: _Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[bytes] = []
    fetch = MediaFetcher.fetch

    def watched(self: MediaFetcher, url: str) -> bytes:
        fetched.append(fetch(self, url))
        return fetched[-1]

    monkeypatch.setattr(MediaFetcher, "fetch", watched)
    with pytest.raises(InvalidRequestError, match="more than 100 bytes"):
        MediaSources(max_bytes=100).read(site("large/5000"), "here")
    assert fetched == []


@pytest.mark.parametrize("page", ["drip", "silent"])
def test_slow_pages_are_given_up(site: _Site, page: str) -> None:
    policy = FetchPolicy(allow_private=True, timeout_s=0.3)
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.3 s"):
        MediaFetcher(policy).fetch(site(page))


def test_nobody_listening_is_a_refusal(site: _Site) -> None:
    url = site("picture")
    site.server.server_close()
    with pytest.raises(InvalidRequestError, match="could not be fetched"):
        MediaFetcher(OPEN).fetch(url)


def test_proxies_of_the_environment_are_not_asked(
    site: _Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", site(""))
    monkeypatch.setenv("ALL_PROXY", site(""))
    with pytest.raises(InvalidRequestError):
        MediaFetcher().fetch("http://10.0.0.1/")
    assert site.asked == []


def test_schemes_can_be_narrowed(site: _Site) -> None:
    fetcher = MediaFetcher(FetchPolicy(schemes=frozenset({"https"}), allow_private=True))
    for url in (site("picture"), "data:,x", "file:///etc/hostname"):
        with pytest.raises(InvalidRequestError, match="allowed are https"):
            fetcher.fetch(url)
    assert site.asked == []
