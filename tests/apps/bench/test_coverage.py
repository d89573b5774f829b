"""The promise over a stream that shifts: what is asked, what is measured, and how it is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import KVShareConfig
from kvshare_mm.apps.bench import audits
from kvshare_mm.apps.bench.coverage import LEARNED, run, summary
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.shifts import (
    PHASES,
    PICTURE_PHASES,
    Asked,
    picture_stream,
    text_stream,
)
from kvshare_mm.apps.bench.tables import TABLES

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(10))


def words(text: str) -> int:
    return len(text.split())


def forms(count: int) -> list[Asked]:
    return [
        Asked(
            "first" if number < count // 2 else "second",
            f"Laboratory report. Patient number {1000 + 37 * number}. {_ROWS} Which patient? It is",
            values={"patient": str(1000 + 37 * number)},
            about="patient",
        )
        for number in range(count)
    ]


def row(kl: float | None = 0.001, **changes: Any) -> dict[str, Any]:
    return {
        **{"tokens": 100, "computed_tokens": 50, "kl": kl, "asked": 0.01, "expected": 0.005},
        **{"declined": None, "audited": False, "right": False, "leak": False, **changes},
    }


def test_a_stream_has_three_parts_and_is_the_same_for_the_same_seed() -> None:
    stream = text_stream(31, None, words)
    assert [asked.phase for asked in stream] == sorted(
        (asked.phase for asked in stream), key=PHASES.index
    )
    assert len(stream) == 31 and {asked.phase for asked in stream} == set(PHASES)
    assert text_stream(31, None, words) == stream != text_stream(31, None, words, seed=1)
    for asked in stream:
        if asked.phase != "chat":
            assert asked.values[str(asked.about)] in str(asked.prompt)
            assert str(asked.about) in str(asked.prompt)


def test_pictures_change_last() -> None:
    stream = picture_stream(18)
    assert [asked.phase for asked in stream[::6]] == list(PICTURE_PHASES)
    assert all(asked.about in asked.values for asked in stream)


def test_prompts_of_files_come_in_turn_with_made_ones(tmp_path: Path) -> None:
    def side(number: int) -> str:
        return " ".join(f"{number} word{i}" for i in range(40))

    pairs = [
        {"source": source, "donor": side(i), "target": side(i + 1)}
        for i, source in enumerate(["chat", "exam_grading", "chat"])
    ] + [{"source": "chat", "donor": "short", "target": "too"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "banking77.jsonl").write_text('{"text": "Where is my card?"}')
    stream = text_stream(60, tmp_path, words)
    read = [(asked.phase, asked.prompt) for asked in stream if asked.chat]
    assert [phase for phase, _ in read] == ["chat"] * 4 + ["exams"] * 2
    assert read[0][1] == side(0) and read[1][1] == side(1)
    assert "Where is my card?" in str(stream[0].prompt)


def test_what_is_kept_is_counted_among_those_that_reuse() -> None:
    found = summary([row(0.02), row(0.007), row(None), row(0.001), row(0.001, right=True)])
    assert (found["requests"], found["approximate"]) == (5, 4)
    assert (found["covered"], found["as_expected"]) == (0.75, 0.5)
    assert (found["asked_for_values"], found["leaks"]) == (1, 0)
    assert summary([row(None)])["covered"] is None


def test_rounding_is_within_any_bound() -> None:
    assert summary([row(1e-7, expected=1e-9)])["as_expected"] == 1


def test_what_is_computed_after_enough_audits_is_told_apart() -> None:
    learning = [row(audited=True)] * LEARNED
    assert summary([*learning[1:], row()])["computed_share_learned"] is None
    assert summary([*learning, row(computed_tokens=10)])["computed_share_learned"] == 0.1


def test_every_request_is_measured_and_only_audits_teach(tiny_folder: Path, tmp_path: Path) -> None:
    rig = Rig(KVShareConfig.of(model=str(tiny_folder), embedder=None, max_divergence=5.0), 2)
    try:
        journal = Journal(tmp_path / "journal", [])
        report = run(rig, forms(12), [1.0], journal=journal)
        assert len(rig.donors.tree) == 0
        assert rig.donors.reuse.calibration is None
        assert run(rig, [], [1.0], journal=journal)["per_request"] == report["per_request"]
    finally:
        rig.close()
    fixed, learned = (report["passes"][name]["all"] for name in ("fixed", "1"))
    assert fixed["approximate"] > 5 and fixed["audits"] == 0
    assert learned["audits"] == learned["approximate"] > 5
    for rows in report["per_request"].values():
        assert all((one["kl"] is None) == (one["expected"] is None) for one in rows)
    first, *_, last = (one for one in report["per_request"]["1"] if one["kl"] is not None)
    assert first["expected"] == pytest.approx(first["bound"]), "nothing was learned"
    assert last["expected"] != pytest.approx(last["bound"])
    assert len(TABLES["coverage"].rows(report)) == 1 + 2 * 3


def test_engines_with_audits_and_without_take_turns(tiny_folder: Path) -> None:
    report = audits.run(str(tiny_folder), forms(8), [1.0], pause_s=0.0)
    assert list(report["shares"]) == ["0", "1"]
    assert report["shares"]["0"]["audits"] == 0
    assert all(found["ttft_s"]["p99"] > 0 for found in report["shares"].values())
    assert all(0 < found["computed_share"] < 1 for found in report["shares"].values())
    assert len(TABLES["audits"].rows(report)) == 3
    plain, audited = (found["alike"] for found in report["shares"].values())
    assert plain == {"requests": 8, "p50": 1.0, "p99": 1.0}
    assert 0 < audited["requests"] <= 8 and audited["p50"] > 0 and audited["p99"] > 0
