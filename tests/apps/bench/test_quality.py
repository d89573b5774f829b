"""Scores and leaks of a run on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.methods import METHODS, AnswerMethod, AnswerStore
from kvshare_mm.apps.bench.quality import interval, run, slots_needed, summarise
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.tasks import TASKS, Item

_REPORTS = TASKS["reports"]


class Echo:
    """An answer store that takes any question for the last one."""

    def __init__(self) -> None:
        self.answer: str | None = None

    def put(self, question: str, answer: str) -> None:
        self.answer = answer

    def get(self, question: str) -> str | None:
        return self.answer

    def close(self) -> None:
        self.answer = None


class Empty(Echo):
    def get(self, question: str) -> str | None:
        return None


def store(name: str, kind: Callable[[], AnswerStore]) -> AnswerMethod:
    return AnswerMethod(name, "a stand-in", lambda: kind)


@pytest.fixture
def items(pairs: list[dict[str, Any]]) -> list[Item]:
    return [
        Item(pair["id"], pair["donor"], pair["target"], ("20",), stale="57") for pair in pairs[:2]
    ]


def test_a_run(rig: Rig, items: list[Item]) -> None:
    methods = [METHODS["prefix"], METHODS["placeholders"], store("echo", Echo),
               store("empty", Empty)]  # fmt: skip
    report = run(rig, _REPORTS, items, methods, Journal(None, None), resamples=50)
    json.dumps(report, allow_nan=False)
    assert report["kind"] == "quality"
    assert (report["task"], report["metric"], report["items"]) == ("reports", "exact match", 2)
    assert list(report["methods"]) == ["full", "prefix", "placeholders", "echo", "empty"]
    full = report["methods"]["full"]
    assert full["difference_to_full"] == {"estimate": 0, "low": 0, "high": 0}
    assert (full["same_answer"], full["computed_share"], full["leaks"]) == (1, 1, 0)
    assert full["changed_facts"] == 2
    assert report["methods"]["prefix"]["same_answer"] == 1
    assert report["methods"]["placeholders"]["computed_share"] < 0.5
    # Stored answers cost nothing; a miss is asked of the model.
    assert report["methods"]["echo"]["computed_share"] == 0
    assert report["methods"]["empty"]["computed_share"] == 1
    assert report["methods"]["empty"]["same_answer"] == 1
    assert len(rig.donors.tree) == 0


def test_stored_answers_are_the_donor_s(rig: Rig, items: list[Item]) -> None:
    one = items[0]
    of_donor = dataclasses.replace(one, target=one.donor)
    options: dict[str, Any] = {"resamples": 10}
    full = run(rig, _REPORTS, [of_donor], [METHODS["full"]], Journal(None, None), **options)
    echoed = run(rig, _REPORTS, [one], [store("echo", Echo)], Journal(None, None), **options)
    wanted = full["per_item"][0]["methods"]["full"]["answer"]
    assert echoed["per_item"][0]["methods"]["echo"]["answer"] == wanted


def rows_of(*answers: tuple[str, str]) -> list[tuple[Item, dict[str, Any]]]:
    item = Item("x", "d", "t", ("121",), stale="148")
    return [
        (
            item,
            {
                "tokens": 100,
                "methods": {
                    name: {"answer": answer, "computed_tokens": computed,
                           "work_tokens": computed, "declined": None}
                    for name, answer, computed in (("full", full, 100), ("other", other, 30))
                },
            },
        )
        for full, other in answers
    ]  # fmt: skip


def test_leaks_are_counted() -> None:
    rows = rows_of(("121", "121"), ("121", "148"), ("121", "7"), ("148", "148"), ("9", "148"))
    found = summarise(_REPORTS, rows, ["full", "other"], 200, 0)
    full, other = found["full"], found["other"]
    assert (full["score"]["estimate"], other["score"]["estimate"]) == (60, 20)
    assert other["difference_to_full"]["estimate"] == -40
    assert (other["leaks"], other["states_donor_fact"]) == (1, 3)
    assert (other["full_states_new_fact"], other["changed_facts"]) == (3, 5)
    assert full["leaks"] == 0
    assert other["computed_share"] == 0.3
    assert other["same_answer"] == 0.4


def test_a_clear_loss_is_significant_and_none_is_not() -> None:
    lost = summarise(_REPORTS, rows_of(*[("121", "148")] * 20), ["full", "other"], 200, 0)
    assert lost["other"]["significant"]
    same = summarise(_REPORTS, rows_of(*[("121", "121")] * 20), ["full", "other"], 200, 0)
    assert not same["other"]["significant"]


def test_known_items_are_not_answered_again(rig: Rig, items: list[Item], tmp_path: Path) -> None:
    path = tmp_path / "j"
    options: dict[str, Any] = {"resamples": 10}
    run(rig, _REPORTS, items[:1], [], Journal(path, "s"), **options)
    journal = Journal(path, "s")
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    lines[1]["result"]["methods"]["full"]["answer"] = "from the journal"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    journal = Journal(path, "s")
    report = run(rig, _REPORTS, items, [], journal, **options)
    answers = [row["methods"]["full"]["answer"] for row in report["per_item"]]
    assert answers[0] == "from the journal" != answers[1]


def test_items_that_do_not_fit_are_skipped(rig: Rig, items: list[Item]) -> None:
    long = dataclasses.replace(items[0], id="long", target="a b " * 400)
    report = run(rig, _REPORTS, [long, items[1]], [], Journal(None, None))
    assert [s["id"] for s in report["skipped"]] == ["long"]
    assert "498 tokens" in report["skipped"][0]["reason"]
    with pytest.raises(ConfigError, match="no item could be served"):
        run(rig, _REPORTS, [long], [], Journal(None, None))


def test_slots() -> None:
    assert slots_needed([]) == slots_needed([METHODS["full"]]) == 2
    assert slots_needed([METHODS["epic"], store("echo", Echo), METHODS["full"]]) == 3


def test_the_interval_of_a_mean_has_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    found = interval(_REPORTS, values, resamples=4000, seed=0)
    # Scores are in percent.
    mean, error = 100 * values.mean(), 100 * values.std() / 400**0.5
    assert found["estimate"] == pytest.approx(mean)
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert found == interval(_REPORTS, values, resamples=4000, seed=0)
    assert found != interval(_REPORTS, values, resamples=4000, seed=1)


def test_what_is_hard_for_both_does_not_widen_the_difference() -> None:
    hard = np.random.default_rng(0).normal(0, 1, (200, 1))
    found = interval(_REPORTS, hard + 0.01, hard, resamples=1000, seed=0)
    assert list(found.values()) == pytest.approx([1, 1, 1])


def test_no_difference_of_many_and_of_one() -> None:
    values = np.arange(10.0)[:, None]
    nothing = {"estimate": 0, "low": 0, "high": 0}
    assert interval(_REPORTS, values, values, resamples=100, seed=0) == nothing
    assert interval(_REPORTS, values[:1], values[:1], resamples=100, seed=0) == nothing
    mixed = np.array([[1.0], [-1.0]] * 10)
    found = interval(_REPORTS, mixed, np.zeros((20, 1)), resamples=500, seed=0)
    assert found["low"] < 0 < found["high"]
