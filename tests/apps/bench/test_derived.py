"""Facts that follow from an edit: what the cases are, and how they are counted."""

from __future__ import annotations

import difflib
from typing import Any

import pytest

from kvshare_mm.apps.bench.derived import DISTANCES, FACTS, Case, derived_cases, run, summary
from kvshare_mm.apps.bench.material import Material
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.tables import TABLES


def words(text: str) -> int:
    return len(text.split())


def row(margin: float, declined: str | None = None, stale: float = -1.0) -> dict[str, Any]:
    found = {"margin": margin, "declined": declined, "extra_tokens": 32}
    return {"donor": -3.0, "full": 3.0, "stale": stale, "methods": {"m": found}}


def test_margins_are_counted_as_defined() -> None:
    found = summary("m", [row(3.0), row(1.0), row(-1.0), row(2.0, stale=1.0)])
    assert found["margin_recovery"] == pytest.approx((4 + 2 + 0 + 1) / (4 + 4 + 4 + 2))
    assert found["flip_rate"] == pytest.approx(2 / 3)  # the last was right when stale
    assert found["stale_answers"] == 1
    assert found["declined"] == 0 and found["extra_tokens"] == 32


def test_declined_is_neither_recovered_nor_stale() -> None:
    found = summary("m", [row(3.0, "too_little"), row(-1.0)])
    assert (found["margin_recovery"], found["flip_rate"]) == (0, 0)
    assert (found["declined"], found["stale_answers"]) == (1, 1)
    assert summary("m", [row(3.0, "too_little")])["margin_recovery"] is None


def test_one_value_is_edited_and_what_follows_stands_so_far_behind_it() -> None:
    cases = derived_cases(Material(None, words, max(DISTANCES)), 2)
    assert len(cases) == 2 * len(FACTS) * len(DISTANCES)
    for case in cases:
        donor, target = case.donor.split(), case.target.split()
        unlike = [
            op for op in difflib.SequenceMatcher(None, donor, target, False).get_opcodes()
            if op[0] != "equal"
        ]  # fmt: skip
        assert len(unlike) == 1 and unlike[0][2] - unlike[0][1] == 1
        assert case.old != case.new and not case.target.endswith(case.new)
        behind = len(target) - unlike[0][4]
        assert case.distance < behind < case.distance + 90


def test_a_run_compares_with_what_is_stale(rig: Rig) -> None:
    rest = "The state was told on the phone, and the file was closed after that. " * 2
    sides = [[f"Ticket {k}: {state}. {rest}So:" for state in ("lost", "paid")] for k in range(8)]
    cases = [Case(side[0], "status", 0, *side, "lost", "paid") for side in sides]
    report = run(rig, cases, [METHODS["prefix"], METHODS["kvshare"]])
    for found in report["per_case"]:
        assert found["methods"]["prefix"]["margin"] == pytest.approx(found["full"], abs=1e-3)
        assert found["methods"]["kvshare"]["extra_tokens"] > 0
        assert found["stale"] != pytest.approx(found["full"], abs=1e-3)
    able = [found for found in report["per_case"] if found["donor"] < 0 < found["full"]]
    assert report["able"] == report["distances"]["0"]["able"]["status"] == len(able)
    assert len(TABLES["derived"].rows(report)) == 3
    assert len(rig.donors.tree) == 0
