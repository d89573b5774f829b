"""`kvshare bench pictures` on a random model, which is never right, and on made-up rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.bench import pictures
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.readme import filled
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.assets.shop.similar import TRAFFIC_WAYS, WAYS
from kvshare_mm.config import KVShareConfig

from ..conftest import Run


@pytest.fixture
def rig(media_folder: Callable[[str], Path]) -> Any:
    model = str(media_folder("qwen2_5_vl"))
    rig = Rig(KVShareConfig(model=model, dtype="float32", repair="none"), num_slots=3)
    yield rig
    rig.close()


def test_every_way_is_asked_by_every_method(rig: Rig) -> None:
    # Ways change after as many pairs as there are topics.
    report = pictures.run(
        rig,
        [METHODS["prefix"], METHODS["kvshare"]],
        num_pairs=len(pictures.TOPICS) * len(WAYS),
        num_leak_pairs=2,
        num_traffic_pairs=len(pictures.TOPICS) * len(TRAFFIC_WAYS),
    )
    assert {p["way"] for p in report["per_pair"]} == set(WAYS)
    assert {p["topic"] for p in report["per_pair"]} == set(pictures.TOPICS)
    for pair in report["per_pair"]:
        full, prefix, kvshare = (pair["methods"][m] for m in ("full", "prefix", "kvshare"))
        assert full["computed_tokens"] == pair["tokens"]
        assert full["answer"] == prefix["answer"]  # exact reuse changes nothing
        assert kvshare["computed_tokens"] <= prefix["computed_tokens"]
        assert full["pictures"] == ["encoder"]
        known = pair["way"] != "other_picture"
        assert kvshare["pictures"] == ["kv" if known else "encoder"]
    for pair in report["per_leak_pair"]:
        assert pair["right"] != pair["donors"]
        assert pair["way"] == "other_picture"
    for pair in report["per_traffic_pair"]:
        # The picture moves along with the text around it; prefix caching ends at the name.
        found = {name: method["pictures"] for name, method in pair["methods"].items()}
        assert found["kvshare"] == ["kv"]
        assert found["prefix"] == ["features" if pair["way"] == "other_name" else "kv"]
    known = report["traffic"]
    assert known["other_question"]["computed_share"]["prefix"] < 0.5
    assert (
        known["other_name"]["computed_share"]["kvshare"]
        < known["other_name"]["computed_share"]["prefix"]
    )
    shares = {name: row["computed_share"] for name, row in report["methods"].items()}
    assert 1 == shares["full"] > shares["prefix"] > shares["kvshare"]
    assert report["methods"]["full"]["encoder_share"] == 1
    assert report["methods"]["kvshare"]["encoder_share"] == 0.25
    assert report["methods"]["prefix"]["same_as_full"] == 1
    assert not rig.donors.tree  # each pair leaves nothing behind


def pair(right: str, donors: str, full: str, kvshare: str, way: str = "rephrased") -> Any:
    methods = {
        name: {"answer": answer, "computed_tokens": 5, "pictures": ["kv"]}
        for name, answer in (("full", full), ("kvshare", kvshare))
    }
    return {
        "way": way, "topic": "kind", "tokens": 10, "right": right, "donors": donors,
        "methods": methods,
    }  # fmt: skip


def test_accuracy_is_the_share_of_right_answers() -> None:
    rows = [
        pair("a", "b", "a", "a"),
        pair("a", "b", "a", "c"),
        pair("a", "b", "c", "c", "other_facts"),
    ]
    row = pictures.accuracy("kvshare", rows)
    assert row["accuracy"] == pytest.approx(1 / 3)
    assert row["accuracy_by_way"]["rephrased"] == 0.5
    assert row["accuracy_by_way"]["other_facts"] == 0
    assert row["accuracy_by_way"]["other_picture"] is None
    assert row["same_as_full"] == pytest.approx(2 / 3)
    assert row["computed_share"] == 0.5


def test_a_leak_is_the_donors_answer_where_full_recompute_knows_better() -> None:
    rows = [
        pair("a", "b", "a", "b"),  # a leak
        pair("a", "b", "b", "b"),  # full recompute is no better
        pair("a", "b", "a", "c"),  # wrong, but nobody's
        pair("a", "b", "a", "a"),
    ]
    assert pictures.leaks("kvshare", rows) == {
        "pairs": 4,
        "right": 1,
        "follow_the_donor": 2,
        "leaks": 1,
    }


def test_traffic_is_told_against_prefix_caching() -> None:
    def asked(kvshare: str, prefix_s: float) -> Any:
        made = {
            name: {"answer": answer, "computed_tokens": computed, "ttft_s": ttft}
            for name, answer, computed, ttft in (
                ("full", "a", 10, 1.0),
                ("prefix", "a", 8, prefix_s),
                ("kvshare", kvshare, 2, 0.5),
            )
        }
        return {"tokens": 10, "methods": made}

    assert pictures.traffic([asked("a", 1.0), asked("b", 2.0), asked("a", 9.0)]) == {
        "pairs": 3,
        "computed_share": {"prefix": 0.8, "kvshare": 0.2},
        "speedup_vs_prefix": 4,
        "same_as_full": pytest.approx(2 / 3),
    }
    assert pictures.traffic([]) is None


def test_the_command(run: Run, media_folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "pictures.json"
    counts = ["--pairs", "3", "--leak-pairs", "1", "--traffic-pairs", "1"]
    options = [*counts, "--photos", "2", "--json", str(out)]
    model = str(media_folder("qwen2_5_vl"))
    done = run("bench", "pictures", "--model", model, *options)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert "3 similar requests" in done.output
    assert "same picture, another question" in " ".join(done.output.split())
    page, _ = filled("<!-- results: p/traffic -->\n<!-- /results -->", {"p": report})
    assert "| same picture, another question |" in page
    assert report["photos"] == 2
    assert len(report["per_pair"][0]["methods"]["full"]["pictures"]) == 2
