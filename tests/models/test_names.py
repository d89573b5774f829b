"""Names of models: what is not there is said before anything is loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models.names import refuse_unknown


@contextmanager
def hub(code: str, status: int) -> Iterator[tuple[str, list[str]]]:
    """A hub with one answer to everything; its address, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return monkeypatch


def test_what_no_hub_has_is_said_at_once(online: pytest.MonkeyPatch) -> None:
    with hub("RepoNotFound", 404) as (address, asked):
        online.setattr(constants, "ENDPOINT", address)
        with pytest.raises(ModelLoadError, match=r"'some/model' here or on http.*smollm2, tiny-vl"):
            refuse_unknown("some/model")
    assert asked[-1].startswith("/api/models/some/model")


def test_a_hub_that_is_not_there_is_asked_once(online: pytest.MonkeyPatch) -> None:
    with hub("", 200) as (address, _):
        online.setattr(constants, "ENDPOINT", address)
    with pytest.raises(ModelLoadError, match=r"cannot be reached\. Here are smollm2, tiny-vl"):
        refuse_unknown("some/model")


@pytest.mark.parametrize(("code", "status"), [("GatedRepo", 403), ("", 503)])
def test_what_else_a_hub_says_is_for_who_loads(
    online: pytest.MonkeyPatch, code: str, status: int
) -> None:
    with hub(code, status) as (address, asked):
        online.setattr(constants, "ENDPOINT", address)
        refuse_unknown("some/model")
    assert asked


def test_what_was_downloaded_needs_no_hub(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    snapshot = tmp_path / "models--some--model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("1")
    refuse_unknown("some/model")
    with pytest.raises(ModelLoadError):
        refuse_unknown("another/model")
