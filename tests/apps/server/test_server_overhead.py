"""`kvshare bench server-overhead` with the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.bench.server_overhead import run as measure
from kvshare_mm.apps.bench.server_overhead import started
from kvshare_mm.errors import ConfigError

from ..conftest import Run
from .conftest import Running


def test_both_are_asked_for_the_same(shared: Running, open_llm: Callable[..., Any]) -> None:
    llm = open_llm()
    before = shared.metric("vllm:request_success_total{")
    report = measure(llm, shared.url, repeats=3, words=6)
    assert report["kind"] == "server-overhead" and report["same_answers"] == 3
    assert shared.metric("vllm:request_success_total{") - before == 3 + 2  # and two to warm up
    # Nothing was reused and nothing is left: each prompt cost both sides the same.
    counted = llm.stats()["requests"]
    assert counted["requests"] == 5
    assert counted["prompt_tokens_recomputed"] == 5 * report["tokens"]
    assert llm.cache.list() == []
    assert len(report["difference_s"]["all"]) == 3
    for side in ("server", "api"):
        assert 0 < report["outside_engine_s"][side] < report["ttft_s"][side]


def test_the_command_with_a_server_that_runs(
    shared: Running, tiny_folder: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out.json"
    result = run("bench", "server-overhead", "--model", tiny_folder, "--url", f"{shared.url}/v1",
                 "--repeats", "2", "--words", "6", "--json", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.output
    report = json.loads(out.read_text())
    assert report["kind"] == "server-overhead" and report["repeats"] == 2


@pytest.mark.e2e
def test_a_server_is_started_and_ended(
    tiny_folder: Path, tmp_path: Path, open_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with started(str(tiny_folder), "float32") as url:
        assert measure(open_llm(), url, repeats=2, words=6)["same_answers"] == 2
    with pytest.raises(ConfigError, match="does not say"):
        measure(open_llm(), url, repeats=2, words=6)
    with (
        pytest.raises(ConfigError, match=r"the server ended with 1: .*no model"),
        started(str(tmp_path / "nothing"), "float32"),
    ):
        pytest.fail("there is no such model")
