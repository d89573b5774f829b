"""Workloads: what changes between two prompts of a kind, and the report of all kinds."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.bench import vllm_engines
from kvshare_mm.apps.bench.material import Material
from kvshare_mm.apps.bench.methods import pick
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.tables import TABLES
from kvshare_mm.apps.bench.workloads import KINDS, pairs_of
from kvshare_mm.apps.bench.workloads import run as measured
from kvshare_mm.errors import ConfigError

from ..conftest import Run

TOKENS = 600  # of words, here


def words(rng: random.Random, number: int) -> str:
    return " ".join(f"{rng.choice('bdfgklmnprst')}{rng.choice('aeiou')}" for _ in range(number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few made-up sessions and documents, laid out as the recorded ones."""
    rng = random.Random(1)
    folder = tmp_path_factory.mktemp("data")

    def call(name: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": '{"order": 7}'}}

    def session(shell: bool) -> dict[str, Any]:
        turns = []
        for _ in range(30):
            code = "\n".join(f"{line}:{words(rng, 8)}" for line in range(1, 41))
            told = code if shell else f"{words(rng, 30)} 4711"
            act = f"```\nopen {words(rng, 1)}\n```" if shell else words(rng, 10)
            calls = {} if shell else {"tool_calls": [call("look_up")]}
            turns += [
                {"role": "user", "content": words(rng, 15)},
                {"role": "assistant", "content": act, **calls},
                {"role": "user" if shell else "tool", "content": told},
                {"role": "assistant", "content": words(rng, 10)},
            ]
        return {"messages": [{"role": "system", "content": words(rng, 400)}, *turns]}

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    write("agents_airline.jsonl", [session(False) for _ in range(3)])
    write("agents_swe.jsonl", [session(True) for _ in range(3)])
    tools = [{"name": words(rng, 1), "description": words(rng, 30)} for _ in range(4)]
    (folder / "agents_airline_tools.json").write_text(json.dumps(tools), encoding="utf-8")
    ctxs = [{"title": "x", "text": words(rng, 40)} for _ in range(20)]
    write("rag_musique.jsonl", [{"ctxs": ctxs, "question": words(rng, 8)} for _ in range(3)])
    return folder


@pytest.fixture(scope="module")
def material(folder: Path) -> Material:
    return Material(folder, lambda text: len(text.split()), TOKENS)


def said(messages: list[dict[str, str]]) -> list[str]:
    return " ".join(m["content"] for m in messages).split()


@pytest.mark.parametrize("kind", KINDS)
def test_two_prompts_of_a_kind_are_alike_and_not_equal(material: Material, kind: str) -> None:
    donor, target = KINDS[kind](material, 0, random.Random(0))
    assert donor != target
    assert KINDS[kind](material, 0, random.Random(0)) == (donor, target), "drawn again, the same"
    assert donor[0]["role"] == target[0]["role"]
    assert len(set(said(donor)) & set(said(target))) > 0.8 * len(set(said(target)))
    assert 0.2 * TOKENS < len(said(target)) < 2 * TOKENS


def test_what_moves_is_all_there(material: Material) -> None:
    for kind in (
        "documents in another order",
        "tools in another order",
        "examples in another order",
    ):
        donor, target = KINDS[kind](material, 1, random.Random(0))
        assert sorted(said(donor)) == sorted(said(target)), kind


def test_pairs_of_every_kind(material: Material) -> None:
    pairs = pairs_of(material, 2)
    assert [pair["id"] for pair in pairs] == [f"{kind}/{i}" for kind in KINDS for i in (0, 1)]
    assert all(pair["donor"] != pair["target"] for pair in pairs)


def test_a_clock_stands_before_everything(material: Material) -> None:
    donor, target = KINDS["clock or request id at the top"](material, 0, random.Random(0))
    before, after = (m[0]["content"].partition("\n") for m in (donor, target))
    assert before[0] != after[0]
    assert before[2] == after[2] and donor[1:] == target[1:]


def test_the_installed_samples_make_every_kind() -> None:
    material = Material(None, lambda text: len(re.findall(r"\w+|[^\w\s]", text)), 1000)
    for kind, make in KINDS.items():
        donor, target = make(material, 1, random.Random(0))
        assert donor != target, kind


def test_too_little_data_is_said(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"too few .* 900000 tokens"):
        Material(folder, lambda text: len(text.split()), 900_000).airline(0)
    with pytest.raises(ConfigError, match=r"agents_airline\.jsonl"):
        Material(folder / "none", len, 100)


def test_the_report(rig: Rig, folder: Path) -> None:
    kinds = ["a document added in front", "file edited in the middle"]
    # The tiny model's context holds 512.
    short = Material(folder, lambda text: len(rig.loaded.tokenizer.encode(text)), 300)
    report = measured(rig, short, pick("kvshare"), number=1, max_new_tokens=4, kinds=kinds)
    assert report["skipped"] == []
    assert list(report["kinds"]) == kinds
    for found in report["kinds"].values():
        prefix, kvshare = (found["methods"][name] for name in ("prefix", "kvshare"))
        assert kvshare["computed_share"] <= prefix["computed_share"]
        assert prefix["speedup_vs_prefix"] == 1
        assert prefix["kl_worst"] < 1e-6
    assert sum(report["actions"].values()) == 2
    added = report["kinds"]["a document added in front"]["methods"]
    assert added["prefix"]["computed_share"] > 0.9
    assert added["kvshare"]["computed_share"] < 0.9
    headings, *rows = TABLES["workloads"].rows(report)
    assert len(rows) == 2 and len(headings) == len(rows[0])


def test_only_the_kinds_that_were_asked_for(material: Material) -> None:
    pairs = pairs_of(material, 2, ["oldest turns dropped"])
    assert [pair["id"] for pair in pairs] == ["oldest turns dropped/0", "oldest turns dropped/1"]
    with pytest.raises(ConfigError, match=r"'none'.* oldest turns dropped"):
        pairs_of(material, 1, ["none"])


def test_inside_vllm_the_same_prompts(
    run: Run, tiny_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def engines(model: str, cases: list[vllm_engines.Case], **asked: Any) -> dict[str, Any]:
        seen.update(cases=cases, **asked)
        return {"kind": "vllm", "vllm": "0", "model": model, "cases": []}

    monkeypatch.setattr(vllm_engines, "run", engines)
    kinds = ["documents in another order", "clock or request id at the top"]
    asked = ["--data", folder, "--model", tiny_folder, "--pairs", "1", "--repeats", "2"]
    which = [word for kind in kinds for word in ("--kind", kind)]
    out = tmp_path / "report.json"
    result = run("bench", "workloads", "--engine", "vllm", *asked, *which, "--json", out)
    assert result.exit_code == 0, result.output
    assert [case.name for case in seen["cases"]] == kinds
    assert seen["repeats"] == 2
    for case in seen["cases"]:
        donor, target = case.donor.token_ids, case.target.token_ids
        assert 500 < len(target) < 1500
        assert donor.tolist() != target.tolist()
    assert json.loads(out.read_text())["kind"] == "vllm"


def test_a_long_example_does_not_end_the_others(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rng = random.Random(2)
    sizes = [100, 900, 100, 90, 80, 70, 60, 50]
    rows = [{"dialogue": words(rng, n), "summary": "short"} for n in sizes]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "dialogsum_dev.jsonl").write_text(lines, encoding="utf-8")
    material = Material(tmp_path, lambda text: len(text.split()), TOKENS)
    assert len(material.examples(0)) > 3
