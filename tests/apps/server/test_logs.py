"""What clients choose is in the log, but as nothing that it is not."""

from __future__ import annotations

import json
import logging
import socket
import sys
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.server import logs

from ...helpers import until
from .conftest import Running

_FORGED = (
    "x\n2026-01-01 00:00:00,000 INFO    [-] forged: line\r\x1b[31m\x07\x7f\u202egnp\u2028\u200b"
)
_CONTROLS = "\n\r\x1b\x07\x7f\u202e\u2028\u200b"


def text_of(record: logging.LogRecord, as_json: bool) -> str:
    record.request_id = "-"
    record.exc_text = None  # what another handler made of the traceback
    return (logs.JsonFormatter() if as_json else logs.TextFormatter()).format(record)


def record_of(message: str, *arguments: object, failed: bool = False) -> logging.LogRecord:
    info = None
    if failed:
        try:
            raise ValueError(_FORGED)
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("x", logging.ERROR, "f", 1, message, arguments, info)


@given(st.text(st.characters()))
def test_a_message_is_one_line_of_the_log(text: str) -> None:
    assert logs.printable(text).isprintable()
    assert text_of(record_of("it said %s", text), as_json=False).isprintable()
    line = text_of(record_of("it said %s", text), as_json=True)
    assert line.isascii() and json.loads(line)["message"].isprintable()


def test_what_can_be_read_stays_as_it_is() -> None:
    assert logs.printable("ein Würfel, 骰子, \\ 🎲") == "ein Würfel, 骰子, \\ 🎲"
    assert logs.printable("a\nb\x1b[0m\u202e") == r"a\nb\x1b[0m\u202e"


def test_the_text_of_an_error_is_no_line_of_the_log() -> None:
    first, *others = text_of(record_of("failed", failed=True), as_json=False).split("\n")
    assert first.endswith("x: failed")
    assert others and all(line.startswith("  | ") and line.isprintable() for line in others)
    entry = text_of(record_of("failed", failed=True), as_json=True)
    assert "\n" not in entry
    assert json.loads(entry)["message"] == "failed"
    error = json.loads(entry)["error"].split("\n")
    assert all(line.isprintable() for line in error)
    assert any("ValueError: x" in line for line in error)


@pytest.mark.parametrize("as_json", [False, True])
def test_paths_and_headers_forge_nothing(
    shared: Running, caplog: pytest.LogCaptureFixture, as_json: bool
) -> None:
    caplog.set_level(logging.INFO)
    forged = b"/v1/models/x%0a2026-01-01%20INFO%20forged%1b[31m%e2%80%ae%e2%80%a8%7f%c2%9b"
    asked = (
        b"GET " + forged + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"X-Request-Id: a\x1b[31m\r\nAuthorization: Bearer \xe2\x80\xae\r\n\r\n"
    )
    malformed = b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n"
    address = urlsplit(shared.url)
    for said in (asked, malformed):
        with socket.create_connection((address.hostname, address.port or 0)) as client:
            client.sendall(said)
            while client.recv(1 << 16):
                pass

    def lines_of_ours() -> list[str]:
        # pytest turns uvicorn's own lines about requests on.
        records = [record for record in caplog.records if record.name != "uvicorn.access"]
        return [text_of(record, as_json) for record in records]

    until(lambda: any("forged" in line for line in lines_of_ours()))
    lines = lines_of_ours()
    assert all(line.isprintable() for line in lines)
    [line] = [line for line in lines if "forged" in line]
    assert "/v1/models/x%0A2026-01-01%20INFO%20forged%1B%5B31m%E2%80%AE" in line
    assert not set(_CONTROLS) & set("".join(lines))
