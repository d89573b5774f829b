"""`kvshare bench serve` against a real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvshare_mm.apps.bench.serve import Load, Sample, read_requests, run_load, summary
from kvshare_mm.apps.cli import app
from kvshare_mm.errors import ConfigError

from .conftest import Running, Start

_BODIES = [
    {"messages": [{"role": "user", "content": f"The quick brown fox {i}"}]} for i in range(6)
]


@pytest.mark.parametrize("load", [Load(3, max_tokens=5), Load(rate=100, max_tokens=5)])
def test_every_request_is_answered_once_and_in_order(shared: Running, load: Load) -> None:
    done: list[Sample] = []
    samples, seconds = asyncio.run(run_load(shared.url, _BODIES, load, on_done=done.append))
    expected = [shared.chat(str(b["messages"][0]["content"]), max_tokens=5).json() for b in _BODIES]
    assert [s.text for s in samples] == [e["choices"][0]["message"]["content"] for e in expected]
    assert sorted(map(id, done)) == sorted(map(id, samples))
    report = summary(samples, seconds)
    assert report["completed"] == 6 and report["errors"] == {}
    assert report["prompt_tokens"] == sum(e["usage"]["prompt_tokens"] for e in expected)
    assert report["completion_tokens"] == sum(e["usage"]["completion_tokens"] for e in expected)
    assert 0 < report["ttft_s"]["p50"] <= report["e2e_s"]["p50"] <= report["e2e_s"]["max"]


def test_cached_tokens_are_counted(shared: Running) -> None:
    body = {**_BODIES[0], "cache_salt": "bench"}
    load = Load(1, max_tokens=1)
    asyncio.run(run_load(shared.url, [body], load))
    shared.llm.flush()
    [again], seconds = asyncio.run(run_load(shared.url, [body], load))
    assert again.cached_tokens > 0
    assert summary([again], seconds)["cached_share"] == again.cached_tokens / again.prompt_tokens


def test_errors_are_counted_by_kind(serve: Start) -> None:
    running = serve({"max_num_seqs": 1, "max_queue": 1})
    load = Load(rate=1000, max_tokens=100, ignore_eos=True)
    samples, seconds = asyncio.run(run_load(running.url, _BODIES, load))
    report = summary(samples, seconds)
    assert set(report["errors"]) == {"status 429"}
    assert report["completed"] + report["errors"]["status 429"] == 6


def test_the_command(shared: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out.json"
    lines = [{"text": "The quick brown fox"}, {**_BODIES[1], "max_tokens": 2}]
    requests.write_text("\n".join(map(json.dumps, lines)))
    result = CliRunner().invoke(
        app,
        ["bench", "serve", "--requests", str(requests), "--url", f"{shared.url}/v1",
         "--repeat", "2", "--max-tokens", "4", "--ignore-eos", "--json", str(out)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "What clients feel, tiny" in result.output and "4 of 4" in result.output
    report = json.loads(out.read_text())
    assert (report["kind"], report["model"]) == ("serve", "tiny")
    assert report["completion_tokens"] == 2 * (4 + 2)


def test_what_cannot_be_sent_is_said(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"text": "x"}\n{"question": "y"}\n')
    with pytest.raises(ConfigError, match="request 2"):
        read_requests(file)
    with pytest.raises(ConfigError, match="does not say"):
        asyncio.run(run_load("http://127.0.0.1:9", _BODIES, Load()))
    with pytest.raises(ConfigError, match="positive"):
        Load(concurrency=0)
