"""End to end with a real model: reuse is large, answers are right, nothing of a donor leaks."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams
from kvshare_mm.apps.showcase import Told, tell
from kvshare_mm.apps.stories import STORIES, Story, picture_stories

from .terminal import COLUMNS, ROWS, lines, run_in_terminal

pytestmark = pytest.mark.e2e

_PARAMS = SamplingParams(max_tokens=24)
_TIMEOUT_S = 600  # the first run on a machine converts the model
_NAMES = [story.name for story in STORIES]

_CLOCK, _LAB, _EXAM, _SUPPORT, _DROPPED = STORIES
# What only the donor's prompt says, and an answer for somebody else must not.
_DONORS_OWN = {
    "clock": ("lamp", "4471"),
    "lab report": ("148", "48210"),
    "exam": ("K2", "1041"),
    "support": ("Ada", "4471"),
    "dropped turn": ("Monday on",),
}


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    with KVShare("smollm2", embedder=None) as llm:
        yield llm


@pytest.fixture(scope="module")
def told(llm: KVShare) -> dict[str, Told]:
    return {story.name: tell(llm, story, repeats=1, max_tokens=24) for story in STORIES}


def reused_share(output: RequestOutput) -> float:
    return 1 - output.provenance.recomputed / len(output.prompt_token_ids)


@pytest.mark.parametrize("story", STORIES, ids=_NAMES)
def test_answers_are_right_and_not_the_donors(told: dict[str, Told], story: Story) -> None:
    found = told[story.name]
    assert story.before in found.donor.text
    assert found.verdict == "right"
    assert found.same_answer
    for text in _DONORS_OWN[story.name]:
        assert text in str(story.donor)
        assert text not in str(story.target)
        assert text not in found.outputs["kvshare"].text


@pytest.mark.parametrize("story", STORIES, ids=_NAMES)
def test_the_methods_do_what_they_say(llm: KVShare, told: dict[str, Told], story: Story) -> None:
    prefix, kvshare = (told[story.name].outputs[m] for m in ("prefix", "kvshare"))
    full = llm.chat(
        story.messages(story.target),
        SamplingParams(max_tokens=24),
        RequestOptions(reuse="off", store=False),
    )
    assert full.provenance.recomputed == len(full.prompt_token_ids)
    assert prefix.token_ids == full.token_ids  # exact reuse changes nothing
    assert prefix.provenance.reused == 0
    assert kvshare.provenance.fallback is None
    assert kvshare.provenance.recomputed < prefix.provenance.recomputed
    assert reused_share(kvshare) >= 0.5


_FIRST_PROCESS = """
import json, sys
from kvshare_mm import KVShare, SamplingParams
from kvshare_mm.apps.stories import STORIES, Story
llm = KVShare("smollm2", store_dir=sys.argv[1])
for story in STORIES:
    llm.chat(story.messages(story.donor), SamplingParams(max_tokens=4))
flushed = llm.flush()
print(json.dumps([flushed, sorted(node.node_id for node in llm._parts.donors.tree)]), flush=True)
sys.stdin.readline()
"""


def test_the_default_embedders_index_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _FIRST_PROCESS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            flushed, stored = json.loads(process.stdout.readline())
        finally:
            process.kill()
    assert flushed
    assert len(stored) == len(STORIES)
    with KVShare("smollm2", store_dir=tmp_path) as llm:
        assert llm.flush()
        donors = llm._parts.donors
        assert donors is not None
        events = llm.stats()["donors"]["events"]
        assert events == {"restored": len(STORIES)}
        semantic: Any = donors.reuse.semantic
        assert semantic._opened[0].ids() == set(stored)
        namespace = donors.tree[stored[0]].namespace
        [nearest, *_] = donors.reuse.similar(_LAB.target, namespace)
        keys = donors.tree[nearest].align_keys.astype("int64")
        assert "Laboratory report" in llm.tokenizer.decode(keys)
        output = llm.chat([{"role": "user", "content": _LAB.target}], _PARAMS)
        assert reused_share(output) >= 0.85
        assert output.provenance.donors == (nearest,)
        assert "121" in output.text


def test_the_demo_writes_its_report(tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts")) / "kvshare"
    out = tmp_path / "demo.json"
    done = subprocess.run(
        [command, "demo", "--repeats", "1", "--json", out],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report) - {"pictures"} == {"command", "kind", "machine", "model", "stories"}
    assert report["model"] == "smollm2"
    assert [story["name"] for story in report["stories"]] == _NAMES
    for story in report["stories"]:
        assert story["name"] in done.stdout
        assert set(story) == {"name", "tokens", "same_answer", "answer", "methods"}
        assert story["answer"] == "right"
        assert set(story["methods"]) == {"prefix", "kvshare"}
        for method in story["methods"].values():
            assert set(method) == {"answer", "ttft_s", "computed_tokens"}
            assert method["ttft_s"] > 0
            assert 0 < method["computed_tokens"] <= story["tokens"]
            assert method["answer"].strip()
    lab = report["stories"][1]
    assert lab["same_answer"]
    assert lab["methods"]["kvshare"]["computed_tokens"] <= 0.15 * lab["tokens"]
    assert "121" in lab["methods"]["kvshare"]["answer"]


def test_the_whole_demo_stays_on_the_screen() -> None:
    """The command above it, the prompt below it and 22 lines of its own on a screen of 80x24."""
    command = str(Path(sysconfig.get_path("scripts")) / "kvshare")
    code, wrote = run_in_terminal([command, "demo", "--repeats", "1"])
    shown = lines(wrote)
    assert code == 0, shown
    shown = shown[shown.index("Loading smollm2 ...") :]  # a first run converts the model
    assert len(shown) <= ROWS - 2
    assert max(map(len, shown)) <= COLUMNS
    for name in (*_NAMES, *(story.name for story in picture_stories())):
        [row] = [line for line in shown if line.startswith(f"{name} ")]
        assert row.count(" ms ") == 2 and row.endswith("right")
