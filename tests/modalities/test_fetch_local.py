"""Fetching without a network: data URLs, files, and what a policy may say."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities import fetch as fetch_module
from kvshare_mm.modalities.fetch import FetchPolicy, MediaFetcher

_PICTURE = b"\x89PNG" + bytes(range(256)) * 4


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:,a%20b", b"a b"),
        ("data:text/plain;base64," + base64.b64encode(_PICTURE).decode(), _PICTURE),
        ("DATA:image/png;BASE64,aGVs\nbG8=", b"hello"),
    ],
)
def test_data_urls(url: str, content: bytes) -> None:
    assert MediaFetcher().fetch(url) == content


@pytest.mark.parametrize("size", [101, 10_000])
def test_large_data_urls_are_refused(size: int) -> None:
    url = "data:;base64," + base64.b64encode(bytes(size)).decode()
    with pytest.raises(InvalidRequestError, match="100 bytes"):
        MediaFetcher(FetchPolicy(max_bytes=100)).fetch(url)


def test_files_only_under_the_roots(tmp_path: Path) -> None:
    root, secret = tmp_path / "photos of things", tmp_path / "secret"
    (root / "in").mkdir(parents=True)
    secret.write_bytes(b"secret")
    (root / "in" / "a.png").write_bytes(_PICTURE)
    (root / "link").symlink_to(secret)
    (root / "fine").symlink_to(root / "in" / "a.png")
    os.mkfifo(root / "pipe")
    (root / "large").write_bytes(bytes(5001))
    fetcher = MediaFetcher(FetchPolicy(file_roots=(root,), max_bytes=5000))
    assert fetcher.fetch((root / "in" / "a.png").as_uri()) == _PICTURE
    assert fetcher.fetch((root / "fine").as_uri()) == _PICTURE
    with pytest.raises(InvalidRequestError, match="bytes"):
        fetcher.fetch((root / "large").as_uri())
    said = set()
    for bad in ("link", "pipe", "in", "missing", "..%2fsecret", "in/../../secret", "a%00b"):
        url = root.as_uri() + "/" + bad
        with pytest.raises(InvalidRequestError) as error:
            fetcher.fetch(url)
        said.add(str(error.value).replace(fetch_module._short(url), ""))
    assert len(said) == 1  # nobody learns from the words what exists


@pytest.mark.parametrize(
    "make",
    [
        lambda: FetchPolicy(schemes=frozenset({"ftp"})),
        lambda: FetchPolicy(max_bytes=0),
        lambda: FetchPolicy(timeout_s=0),
        lambda: FetchPolicy(max_redirects=-1),
    ],
)
def test_policies_are_checked(make: Callable[[], FetchPolicy]) -> None:
    with pytest.raises(ValueError, match=r"schemes|max_bytes"):
        make()


def test_messages_are_short_and_printable() -> None:
    with pytest.raises(InvalidRequestError) as error:
        MediaFetcher().fetch("gopher:\n\x1b[31m" + "x" * 10_000)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
