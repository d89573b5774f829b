"""The laboratory's commands on a tiny model: what people see, and what scripts read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from kvshare_mm.apps.bench import shifts
from kvshare_mm.apps.bench.tasks import TASKS
from kvshare_mm.apps.bench.tasks.exams import Exams
from kvshare_mm.apps.bench.tasks.reports import Reports
from kvshare_mm.apps.bench.theme import LABELS

from ..conftest import Run


@pytest.fixture
def bench(run: Run) -> Run:
    return partial(run, "bench")


def measured(bench: Run, out: Path, *arguments: Any) -> tuple[dict[str, Any], str]:
    """The report that a command wrote, and what it showed."""
    result = bench(*arguments, "--json", out)
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text(), parse_constant=pytest.fail), result.output  # NaN is no JSON


@pytest.fixture
def short_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's context holds 512 tokens, of which a word takes several."""
    monkeypatch.setitem(TASKS, "exams", Exams(questions=3, changed=2))
    monkeypatch.setitem(TASKS, "reports", Reports(rows=3, changed=2))


@pytest.fixture
def pairs_file(pairs: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return path


@pytest.fixture
def stream_file(pairs: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "stream.jsonl"
    texts = [pair[side] for pair in pairs for side in ("donor", "target")]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    [line] = [x for x in result.output.splitlines() if x.startswith("Error:")]
    for word in words:
        assert word in line


def test_quality(bench: Run, short_tasks: None, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "quality.json"
    report, shown = measured(
        bench, out, "quality", "--task", "exams", "--model", tiny_folder, "--limit", 2,
        "--methods", "placeholders,repair=window:2",
    )  # fmt: skip
    for text in ("exams, 2 items", "exact match", "leaks", "repair=window:2"):
        assert text in shown
    assert list(report["methods"]) == ["full", "placeholders", "repair=window:2"]
    assert report["items"] == 2
    assert [path.name for path in out.parent.iterdir()] == ["quality.json"]  # no journal is left


def test_a_killed_run_goes_on(
    bench: Run, tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvshare_mm.apps.bench import frontier

    measured: list[str] = []
    real = frontier.at_points

    def killed(rig: Any, asked: Any, points: Any) -> Any:
        measured.append(asked.ns)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(rig, asked, points)

    monkeypatch.setattr(frontier, "at_points", killed)
    out = tmp_path / "frontier.json"
    call = ("frontier", "--pairs", pairs_file, "--model", tiny_folder, "--json", out,
            "--methods", "prefix,epic")  # fmt: skip
    assert bench(*call).exit_code != 0
    assert not out.exists()
    assert (tmp_path / "frontier.json.partial").exists()
    result = bench(*call)
    assert result.exit_code == 0, result.output
    first, second, again, third = measured
    assert second == again and len({first, second, third}) == 3
    assert json.loads(out.read_text())["pairs"] == 3
    assert "window:16" in result.output
    assert not (tmp_path / "frontier.json.partial").exists()


def test_frontier_of_workloads(
    bench: Run, tiny_folder: Path, pairs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvshare_mm.apps.bench import workloads

    # The tiny model's context is too short for those of the samples.
    monkeypatch.setattr(workloads, "pairs_of", lambda material, number: pairs[:number])
    report, shown = measured(
        bench, tmp_path / "f.json", "frontier", "--workloads", 2, "--model", tiny_folder,
        "--methods", "prophetkv,boundary,window32,llamacpp",
    )  # fmt: skip
    assert (report["pairs"], report["what"]) == (2, "prompts of 1000 tokens with small edits")
    assert [len(points) for points in report["methods"].values()] == [5, 3, 1, 2]
    assert "ProphetKV-style" in shown


def test_reuse_by_all_methods_and_other_settings_do_not_go_on(
    bench: Run, tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    (tmp_path / "r.json.partial").write_text('{"key": "settings", "result": "other"}\n')
    report, shown = measured(
        bench, out, "reuse", "--pairs", pairs_file, "--model", tiny_folder, "--repeats", 1,
        "--max-new-tokens", 2, "--limit", 2, "--layers",
    )  # fmt: skip
    assert report["pairs"] == 2 and "2 pairs" in shown
    methods = ["full", "prefix", "placeholders", "cacheblend", "epic", "kvshare"]
    assert list(report["methods"]) == methods
    assert all(LABELS[name] in shown for name in methods)
    assert {"cpu", "cores", "memory_gib", "gpu", "threads", "torch", "python"} <= set(
        report["machine"]
    )


@pytest.mark.parametrize("plan_only", [True, False])
def test_hitrate_needs_a_model_only_to_serve(
    bench: Run, tiny_folder: Path, stream_file: Path, tmp_path: Path, plan_only: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if plan_only:
        monkeypatch.setattr(
            "kvshare_mm.assemble.load_model", lambda *_, **__: pytest.fail("loaded")
        )
    report, _ = measured(
        bench, tmp_path / "hitrate.json", "hitrate", "--stream", stream_file,
        "--model", tiny_folder, *["--plan-only"][:plan_only], "--embedder", "none", "--no-shuffle",
        "--measure", 5, "--pool-sizes", "4,1",
    )  # fmt: skip
    assert (report["kind"], report["stream"], report["measured"]) == ("hitrate", "stream", 5)
    assert (list(report["pool_sizes"]), report["plan_only"]) == (["1", "4"], plan_only)
    methods = report["pool_sizes"]["4"]["methods"]
    assert methods["kvshare"]["token_share"] > methods["prefix"]["token_share"]
    # The target of the last pair has nothing in common with anything.
    assert methods["kvshare"]["shares"][-1] == 0


def test_similar_only(
    bench: Run, tiny_folder: Path, stream_file: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare_mm.modalities.embed.TextEmbedder", lambda name: letters)
    result = bench("hitrate", "--stream", stream_file, "--model", tiny_folder, "--plan-only",
                 "--similar-only", "--pool-sizes", "9")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4 of 6 different prompts have a partner" in result.output


def test_lookup(
    bench: Run,
    pairs_file: Path,
    tiny_folder: Path,
    stream_file: Path,
    letters: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvshare_mm.modalities.embed.TextEmbedder", lambda name: letters)
    pool = tmp_path / "pool.jsonl"
    others = [{"text": f"Story {i}: {'once upon a time ' * i}"} for i in range(1, 9)]
    pool.write_text(stream_file.read_text() + "\n" + "\n".join(map(json.dumps, others)))
    report, shown = measured(
        bench, tmp_path / "lookup.json", "lookup", "--pairs", pairs_file, "--pool", pool,
        "--model", tiny_folder, "--limit", 2,
    )  # fmt: skip
    # The pool's own copies of the pairs are left out, but for those of the third.
    assert (report["pairs"], report["records"]) == (2, 2 + 2 + 8)
    for found in report["methods"].values():
        assert found["recall"]["4"] == 1
    for text in ("2 donors among 12 prompts", "recall at 8", "embedding, Milvus", "1.000"):
        assert text in shown


def test_overhead(bench: Run, stream_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    report, shown = measured(
        bench, tmp_path / "overhead.json", "overhead", "--prompts", stream_file,
        "--model", tiny_folder, "--donors", 3, "--tokens", 40, "--repeats", 1,
    )  # fmt: skip
    assert (report["donors"], report["tokens"]) == (3, 40)
    assert 0 < report["lookup_and_plan_s"] < report["miss_cost_s"]
    assert "40 tokens" in shown


def test_what_is_wrong_is_said(
    bench: Run, tiny_folder: Path, pairs_file: Path, stream_file: Path, tmp_path: Path
) -> None:
    model = ("--model", tiny_folder)
    refused(bench("quality", "--task", "magic", *model), "'magic'", "translation")
    refused(bench("quality", "--task", "summaries", *model), "--data")
    refused(bench("quality", "--task", "exams", "--methods", "magic", *model), "'magic'")
    refused(bench("quality", "--task", "exams", "--repair", "magic", *model), "'magic'")
    refused(bench("frontier", "--pairs", stream_file, *model), "donor")
    refused(bench("frontier", *model), "--pairs", "--workloads")
    refused(bench("frontier", "--pairs", pairs_file, "--workloads", 1, *model), "--workloads")
    refused(bench("reuse", "--pairs", stream_file, "--methods", "gptcache", *model), "gptcache")
    wrong = tmp_path / "wrong[bold].jsonl"
    wrong.write_text('{"donor": "a", "target": "b"}\n{"donor": "a"}\n')
    refused(bench("reuse", "--pairs", wrong, *model), "wrong[bold].jsonl:2", "target")
    refused(bench("reuse", "--pairs", tmp_path, *model), str(tmp_path))
    refused(bench("reuse", "--pairs", pairs_file, "--model", "/nowhere"), "/nowhere")
    stream = ("hitrate", "--stream", stream_file, "--plan-only", "--embedder", "none", *model)
    refused(bench(*stream, "--pool-sizes", "ten"), "'ten'")
    refused(bench(*stream, "--pool-sizes", "0"), "above 0")
    refused(bench(*stream, "--similar-only"), "embedder")
    refused(bench(*stream, "--repair", "magic"), "'magic'")
    refused(bench("hitrate", "--stream", "nowhere", "--plan-only"), "nowhere", "wildchat")
    refused(bench("report", "--in", tmp_path / "nowhere", "--out", tmp_path / "x.html"), "nowhere")


def test_the_promise_over_a_stream(bench: Run, tiny_folder: Path, tmp_path: Path) -> None:
    report, shown = measured(
        bench, tmp_path / "coverage.json", "coverage", "--model", tiny_folder, "--requests", 9,
        "--audit-shares", "1", "--max-divergence", 5,
    )  # fmt: skip
    assert report["requests"] + report["too_long"] == 9
    assert report["max_divergence"] == 5
    for text in ("fixed", "100%", "kept", "as expected"):
        assert text in shown
    refused(bench("coverage", "--model", tiny_folder, "--audit-shares", "2"), "audit shares")
    refused(bench("coverage", "--model", tiny_folder, "--audit-shares", "0"), "audit shares")


def test_audits_beside_those_who_wait(
    bench: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(length: int, *_: Any) -> list[shifts.Asked]:
        return [shifts.Asked("chat", f"Where is card {i}?", chat=True) for i in range(length)]

    monkeypatch.setattr(shifts, "text_stream", stream)
    report, shown = measured(
        bench, tmp_path / "audits.json", "audits", "--model", tiny_folder, "--requests", 3,
        "--audit-shares", "1", "--pause-s", 0,
    )  # fmt: skip
    assert [*report["shares"]] == ["0", "1"]
    assert "interrupted" in shown
