"""`kvshare bench serve` against a real server."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.bench.serve import Sample, client_of, load, read_requests, run_load, summary
from kvshare_mm.errors import ConfigError

from ...helpers import until
from ..conftest import Run
from .conftest import Running, Start, held

_BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"The quick brown fox {i}"}], "max_tokens": 5}
    for i in range(6)
]


def test_every_request_is_answered_once_and_in_order(shared: Running) -> None:
    done: list[Sample] = []

    async def ask() -> list[Sample]:
        bodies = [{"temperature": 0, "model": "tiny", **body} for body in _BODIES]
        async with client_of(shared.url) as client:
            return await run_load(client, bodies, 3, done.append)

    samples = asyncio.run(ask())
    expected = [shared.chat(b["messages"][0]["content"], max_tokens=5).json() for b in _BODIES]
    assert [s.text for s in samples] == [e["choices"][0]["message"]["content"] for e in expected]
    assert sorted(map(id, done)) == sorted(map(id, samples))
    report = summary(samples)
    assert report["completed"] == 6 and report["errors"] == {}
    assert report["prompt_tokens"] == sum(e["usage"]["prompt_tokens"] for e in expected)
    assert 0 < report["engine_ttft_s"]["p50"] <= report["ttft_s"]["p50"]


def test_reuse_is_told_by_its_origin(shared: Running) -> None:
    body = {**_BODIES[0], "cache_salt": "bench"}
    first = asyncio.run(load(shared.url, [body], 1))
    assert first["shares"] == {"exact": 0, "reused": 0, "recomputed": 1}
    assert sum(first["declined"].values()) == 1
    shared.llm.flush()
    again = asyncio.run(load(shared.url, [body], 1))
    assert again["shares"]["exact"] > 0.5
    assert sum(again["shares"].values()) == pytest.approx(1)


def test_errors_are_counted_by_kind(serve: Start, beside: Executor) -> None:
    running = serve({"max_num_seqs": 1, "max_queue": 1})
    bodies = [{**body, "max_tokens": 100, "ignore_eos": True} for body in _BODIES]
    with held(running):  # one runs, one waits
        asking = beside.submit(lambda: asyncio.run(load(running.url, bodies, len(bodies))))
        until(lambda: running.llm.stats()["requests"].get("queue_full", 0) >= 4)
    report = asking.result(60)
    assert set(report["errors"]) == {"status 429"}
    assert report["completed"] + report["errors"]["status 429"] == 6


def test_the_command(shared: Running, tmp_path: Path, run: Run) -> None:
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out.json"
    lines = [{"text": "The quick brown fox"}, {**_BODIES[1], "max_tokens": 2}]
    requests.write_text("\n".join(map(json.dumps, lines)))
    call = ("bench", "serve", "--requests", requests, "--url", f"{shared.url}/v1",
            "--max-tokens", "4", "--json", out)  # fmt: skip
    result = run(*call)
    assert result.exit_code == 0, result.output
    assert "What was reused under load, tiny" in result.output and "2 of 2" in result.output
    report = json.loads(out.read_text())
    assert (report["kind"], report["model"]) == ("serve", "tiny")
    requests.write_text(json.dumps({**_BODIES[0], "max_tokens": -1}))
    result = run(*call)
    assert result.exit_code == 1, result.output
    assert "1 failed: status 4" in result.output


def test_what_cannot_be_sent_is_said(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"text": "x"}\n{"question": "y"}\n')
    with pytest.raises(ConfigError, match="request 2"):
        read_requests(file)
    with pytest.raises(ConfigError, match="does not say"):
        asyncio.run(load("http://127.0.0.1:9", _BODIES, 1))


def test_another_server_says_nothing_of_reuse() -> None:
    with pytest.raises(ConfigError, match="not this project's"):
        summary([Sample(ttft=0.1, text="Hi")])
