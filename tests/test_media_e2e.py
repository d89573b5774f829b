"""End to end with the embedded models that see and hear: right answers, reuse, no other's facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvshare_mm import KVShare, SamplingParams
from kvshare_mm.apps.bench import pictures
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.cli import app
from kvshare_mm.apps.stories import picture_stories
from kvshare_mm.config import KVShareConfig

from .helpers import samples

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    with KVShare("tiny-vl", embedder=None, media_embedder="tiny-clip") as llm:
        yield llm


def share_right(llm: KVShare, found: list[tuple[list[dict[str, Any]], str]]) -> float:
    answers = [llm.chat(messages, SamplingParams(max_tokens=24)).text for messages, _ in found]
    return sum(a == want for a, (_, want) in zip(answers, found, strict=True)) / len(found)


def test_the_samples_are_answered_right(llm: KVShare) -> None:
    assert share_right(llm, samples("tiny-vl")) >= 0.95


def test_a_clip_asked_about_again_is_not_heard_again() -> None:
    found = samples("tiny-audio")
    messages, want = found[0]
    system, user = messages[0], messages[1]
    clip, question = user["content"]
    assert question["text"] != "Tell me the last word."
    with KVShare("tiny-audio", embedder=None) as llm:
        assert share_right(llm, found) >= 0.9
        first = llm.chat(messages, SamplingParams(max_tokens=24))
        assert llm.flush(60)
        other = {"type": "text", "text": "Tell me the last word."}
        again = llm.chat(
            [system, {**user, "content": [clip, other]}], SamplingParams(max_tokens=24)
        )
    assert first.text == want == "I hear: refund stop."
    assert again.text == "The last word is stop."
    assert [use.source for use in again.provenance.media] == ["kv"]
    assert again.provenance.recomputed < 25


def test_reuse_costs_no_right_answers_and_leaks_nothing() -> None:
    rig = Rig(KVShareConfig(model="tiny-vl", max_model_len=2048, embedder=None), num_slots=3)
    try:
        methods = [METHODS["prefix"], METHODS["kvshare"]]
        report = pictures.run(rig, methods, num_pairs=96, num_leak_pairs=48)
    finally:
        rig.close()
    full, kvshare = (report["methods"][name]["accuracy"] for name in ("full", "kvshare"))
    assert full >= 0.9
    assert kvshare >= full - 0.02
    assert report["leaks"]["kvshare"]["leaks"] == 0
    assert (
        report["methods"]["kvshare"]["computed_share"]
        < report["methods"]["prefix"]["computed_share"]
    )


def test_the_demo_of_the_model_that_sees_tells_of_pictures(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    result = CliRunner().invoke(
        app, ["demo", "--model", "tiny-vl", "--repeats", "1", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [s["name"] for s in report["stories"]] == [s.name for s in picture_stories()]
    assert "pictures" not in report
    for story in report["stories"]:
        assert story["same_answer"]
        computed = {name: each["computed_tokens"] for name, each in story["methods"].items()}
        assert computed["kvshare"] < computed["prefix"]
