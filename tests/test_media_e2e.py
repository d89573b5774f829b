"""End to end with the embedded model that sees: right answers, reuse, no other picture's facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import KVShare, SamplingParams, assets
from kvshare_mm.apps.bench import pictures
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.showcase import tell
from kvshare_mm.apps.stories import picture_stories
from kvshare_mm.config import KVShareConfig

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    with KVShare("tiny-vl", embedder=None, media_embedder="tiny-clip") as llm:
        yield llm


def samples() -> list[tuple[list[dict[str, Any]], str]]:
    folder = assets.folder("tiny-vl") / "samples"
    found = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for message in sample["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = str(Path(folder) / part["image"])
        found.append((sample["messages"], sample["answer"]))
    return found


def test_the_samples_are_answered_right(llm: KVShare) -> None:
    found = samples()
    answers = [llm.chat(messages, SamplingParams(max_tokens=24)).text for messages, _ in found]
    right = sum(a == want for a, (_, want) in zip(answers, found, strict=True))
    assert right >= 0.95 * len(found)


@pytest.mark.parametrize("number", [0, 1])
def test_the_stories_end_as_full_recompute_ends_them(llm: KVShare, number: int) -> None:
    told = tell(llm, picture_stories()[number], repeats=1, max_tokens=24)
    assert told.same_answer
    assert (
        told.outputs["kvshare"].provenance.recomputed < told.outputs["full"].provenance.recomputed
    )


def test_reuse_costs_no_right_answers_and_leaks_nothing() -> None:
    rig = Rig(KVShareConfig(model="tiny-vl", max_model_len=2048, embedder=None), num_slots=3)
    try:
        methods = [METHODS["prefix"], METHODS["kvshare"]]
        report = pictures.run(rig, methods, num_pairs=96, num_leak_pairs=48, progress=False)
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
