"""The command that a report says it was measured with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvshare_mm.apps.terminal import write_report

SERVE = "serve --url http://127.0.0.1:8000 --requests 4"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"{SERVE} --key sk-secret", SERVE),
        (f"{SERVE} --key=sk-secret", SERVE),
        (f"{SERVE} --api-key sk-secret", SERVE),
        (f"--api-key=sk-secret {SERVE} --json /y/z.json", SERVE),
        ("reuse --pairs /d/p.jsonl --json /y/z.json --limit 3", "reuse --pairs p.jsonl --limit 3"),
        ("serve --requests /x/r.jsonl --url http://h:8000/v1",
         "serve --requests r.jsonl --url http://h:8000/v1"),
    ],
)  # fmt: skip
def test_no_key_no_folder_and_no_report_is_in_it(
    said: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["/x/bin/kvshare", "bench", *said.split()])
    write_report({"kind": "reuse"}, out)
    assert "secret" not in out.read_text("utf-8")
    report = json.loads(out.read_text("utf-8"))
    assert report["command"] == f"kvshare bench {told}"
    assert report["machine"]["torch"] and report["kind"] == "reuse"
