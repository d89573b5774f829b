"""Data URLs and base64, decoded in pieces as they would be at once."""

from __future__ import annotations

import base64
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.modalities import data_url


@pytest.fixture(autouse=True, scope="module", params=[4, 7, 1 << 16])
def piece(request: pytest.FixtureRequest) -> object:
    before, data_url._PIECE = data_url._PIECE, request.param
    yield
    data_url._PIECE = before


def at_once(url: str) -> bytes | None:
    head, _, body = url.partition(",")
    content = unquote_to_bytes(body)
    if not head.endswith(";base64"):
        return content
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except ValueError:
        return None


def in_pieces(url: str) -> bytes | None:
    try:
        return data_url.decoded(url)
    except ValueError:
        return None


@given(st.binary(max_size=100), st.booleans())
def test_what_was_encoded(content: bytes, escaped: bool) -> None:
    text = base64.b64encode(content).decode()
    assert (
        data_url.decoded("data:;base64," + (quote(text, safe="") if escaped else text)) == content
    )
    assert data_url.decoded("data:," + quote(content)) == content
    lines = "\r\n".join(text[at : at + 5] for at in range(0, len(text), 5))
    assert data_url.from_base64(data_url.pieces(lines)) == content


@given(st.text(alphabet="AZaz09+/= \n%1234é", max_size=40), st.booleans())
def test_malformed_ones_are_as_if_decoded_at_once(body: str, in_base64: bool) -> None:
    url = ("data:;base64," if in_base64 else "data:,") + body
    made = in_pieces(url)
    # `base64` overlooks an end behind the end.
    assert made == at_once(url) or (made is None and body.rstrip().endswith("="))


@pytest.mark.parametrize("text", ["A", "AAA", "AA==AAAA", "AAAA=AAA", "=AAA", "AA=A", "AA==="])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        data_url.from_base64(data_url.pieces(text))
