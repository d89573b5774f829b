"""`kvshare bench ... --engine vllm`: two real engines in turns, on a random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvshare_mm.apps.cli import app

from .engines import patience

pytestmark = pytest.mark.vllm


def test_both_engines_answer_and_only_one_reuses(
    random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    words = [f"word{i % 7} number {i * i % 97}," for i in range(24)]
    donor, target = " ".join(words), " ".join([*words[:12], "something new,", *words[14:]])
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "report.json"
    pairs.write_text(json.dumps({"id": "one", "donor": donor, "target": target}), encoding="utf-8")
    asked = ["--pairs", str(pairs), "--model", str(random_model("llama")), "--engine", "vllm"]
    options = ["--repair", "none", "--repeats", "1", "--max-new-tokens", "4", "--json", str(out)]
    with patience():
        result = CliRunner().invoke(app, ["bench", "reuse", *asked, *options])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    (case,) = report["cases"]
    assert case["reused"] > 0
    assert case["exact"] + case["reused"] + case["computed"] == case["tokens"]
    assert case["miss_reused"] == 0, "what was stored before is unlike it"
    assert min(case["ttft_s"].values()) > 0
    assert case["of_ideal"] == pytest.approx(case["ttft_s"]["kvshare"] / case["ttft_s"]["ideal"])
    assert report["times_sooner"]["median"] == pytest.approx(
        case["ttft_s"]["stock"] / case["ttft_s"]["kvshare"]
    )
