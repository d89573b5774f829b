"""`kvshare calibrate`: what it learns from a file of requests, and what a server starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import ConfigError, KVShare
from kvshare_mm.apps.calibrate import read_requests

from .conftest import Run

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))


def _prompt(number: int) -> str:
    return f"Laboratory report. Patient number {number}. {_ROWS} What is value 3?"


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": _prompt(i)} for i in range(40, 45)]
    rows += [
        {"model": "any", "messages": [{"role": "user", "content": _prompt(7)}], "stream": True},
        {"text": _prompt(8)},
        {"messages": [{"role": "user", "content": 5}]},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_learned_is_what_a_server_starts_from(
    run: Run, tiny_folder: Path, requests: Path, tmp_path: Path, open_llm: Callable[..., KVShare]
) -> None:
    out, report = tmp_path / "learned.json", tmp_path / "report.json"
    words = ["calibrate", tiny_folder, "--requests", requests, "--repair", "none", "--out", out]
    words += ["--max-tokens", "4", "--json", report, "--store-dir", tmp_path / "store"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "are promised" in result.output and "Laboratory report" in result.output
    told = json.loads(report.read_text())
    assert (told["requests"], told["skipped"]) == (7, 1)
    audits = sum(family["audits"] for family in told["families"])
    assert audits == sum(told["audits"]["divergence"]["counts"]) == 3  # it is given up then
    for options in ({"calibration": out}, {"store_dir": tmp_path / "store"}):
        llm = open_llm(audit_share=0, **options)
        assert llm._parts.donors is not None and llm._parts.auditor is None
        known = llm._parts.donors.reuse.calibration
        assert known is not None and not known.empty


def test_a_calibration_of_nothing_is_refused(
    tmp_path: Path, open_llm: Callable[..., KVShare]
) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        open_llm(calibration=tmp_path / "nothing.json")


def test_a_line_that_asks_for_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "one"}\n{"question": "two"}\n')
    with pytest.raises(ConfigError, match="request 2"):
        read_requests(path)
    assert read_requests(path, limit=1) == ["one"]
