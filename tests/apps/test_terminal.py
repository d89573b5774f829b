"""The command that a report says it was measured with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvshare_mm.apps.terminal import write_report

SAID = "kvshare bench serve --url http://127.0.0.1:8000 --requests 4"


@pytest.mark.parametrize(
    "secret",
    [
        ["--key", "sk-secret"],
        ["--key=sk-secret"],
        ["--api-key", "sk-secret"],
        ["--api-key=sk-secret"],
    ],
)
def test_no_key_no_folder_and_no_report_is_in_it(
    secret: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.json"
    words = ["bench", "serve", "--url", "http://127.0.0.1:8000", *secret, "--requests", "4"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kvshare", *words, "--json", str(out)])
    write_report({"kind": "serve"}, out)
    assert "secret" not in out.read_text("utf-8")
    assert json.loads(out.read_text("utf-8"))["command"] == SAID


def test_of_a_path_the_name_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(
        sys, "argv", ["kvshare", "bench", "reuse", "--pairs", "/home/me/pairs.jsonl"]
    )
    write_report({}, out)
    assert (
        json.loads(out.read_text("utf-8"))["command"] == "kvshare bench reuse --pairs pairs.jsonl"
    )
