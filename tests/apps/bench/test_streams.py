"""`kvshare bench streams` and `bench burst`: what is measured, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvshare_mm.apps.bench import burst, streams
from kvshare_mm.apps.bench.tables import TABLES

from ..conftest import Run


def test_streams_are_served_in_chunks_and_whole(tiny_folder: Path) -> None:
    # Answers go on for a while: on a busy machine the long prompt may come late.
    report = streams.run(
        str(tiny_folder), streams=2, tokens=200, answer=160, chunks=[16], repeats=2
    )
    ways = report["chunks"]
    assert list(ways) == [streams.WHOLE, "16"]
    for way in ways.values():
        assert 0 < way["usual_s"]["p50"] <= way["usual_s"]["p99"]
        assert 0 < way["beside_s"]["p50"] <= way["beside_s"]["p99"]
        assert way["times_usual"] == way["beside_s"]["p99"] / way["usual_s"]["p50"]
        assert min(way["short_ttft_s"], way["long_ttft_s"], way["tokens_s"]) > 0
    assert ways[streams.WHOLE]["throughput_of_whole"] == 1
    headings, *rows = TABLES["streams"].rows(report)
    assert len(rows) == 2 and "times usual" in headings


def test_a_burst_computes_less_where_requests_are_similar(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(12))
    prompts = [f"Laboratory report. Patient number {i + 20}. {rows}" for i in range(6)]
    monkeypatch.setattr(burst, "variants", lambda *_: prompts)
    report = burst.run(str(tiny_folder), requests=6, reports=1, values=2, answer=2)
    off, similar = report["ways"].values()
    assert off["computed"] > similar["computed"] > 0
    assert report["computed_share"] == similar["computed"] / off["computed"]
    assert off["ttft_s"].keys() == {"mean", "p50", "p90"}


def test_the_commands(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "streams.json"
    done = run("bench", "streams", "--model", tiny_folder, "--tokens", 100, "--answer", 32,
               "--chunk", 8, "--json", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["streams"] == 2
