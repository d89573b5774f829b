"""`kvshare bench drafts`: the same answers, and what of them was drafted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvshare_mm.apps.bench import drafts
from kvshare_mm.apps.bench.tables import TABLES

from ..conftest import Run


def _pairs(count: int) -> list[dict[str, str]]:
    words = "red green blue red green blue red green blue"
    return [
        {"id": str(i), "donor": f"Order {i}: {words}", "target": f"Order {i + 50}: {words}"}
        for i in range(count)
    ]


def test_answers_are_the_same_and_drafts_are_counted(tiny_folder: Path) -> None:
    report = drafts.run(str(tiny_folder), _pairs(4), 24)
    assert list(report["kinds"]) == ["nothing like it before", "a similar request before"]
    for found in report["kinds"].values():
        assert (found["answers"], found["same"]) == (4, 4)
        assert found["tokens_a_forward"] >= 1
        assert found["token_s"].keys() == {"plain", "drafts"}
        assert found["times_sooner_worst"] <= found["times_sooner_median"]
    headings, *rows = TABLES["drafts"].rows(report)
    assert len(rows) == 2 and "tokens a forward" in headings


def test_an_answer_that_drafts_changed_is_told(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = drafts._ask

    def other(*args: object) -> object:
        found = asked(*args)  # type: ignore[arg-type]
        return found and drafts._Asked(False, found.seconds, found.forwards, found.tokens)

    monkeypatch.setattr(drafts, "_ask", other)
    report = drafts.run(str(tiny_folder), _pairs(1), 8)
    assert [found["same"] for found in report["kinds"].values()] == [0, 0]


def test_the_command_leaves_out_what_cannot_be_asked(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    long = {"id": "long", "donor": "word " * 5000, "target": "word"}
    pairs.write_text("\n".join(json.dumps(pair) for pair in [*_pairs(1), long]))
    out = tmp_path / "report.json"
    done = run("bench", "drafts", "--pairs", pairs, "--model", tiny_folder, "--json", out)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert list(report["skipped"]) == ["long"]
    assert report["kinds"]["a similar request before"]["answers"] == 1
