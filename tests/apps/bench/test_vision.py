"""`kvshare bench vision` on a shape that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvshare_mm.apps.bench import vision
from kvshare_mm.apps.bench.vision_model import QWEN25_VL_3B, Shape

from ..conftest import Run

SMALL = Shape(128, 2, 64, 1, 1, 80, 4, 64, 1)


def test_dividing_keeps_what_the_tower_costs_beside_the_text() -> None:
    for by in (2, 4):
        part = QWEN25_VL_3B.divided(by)
        ratio = part.vision_macs / part.text_macs
        assert ratio == pytest.approx(QWEN25_VL_3B.vision_macs / QWEN25_VL_3B.text_macs, rel=0.05)
        assert part.text_hidden // part.heads == 128  # M-RoPE's sections fill it
        assert part.full_blocks[-1] == part.vision_depth - 1


def test_parameters_are_as_many_as_multiply_adds() -> None:
    """A weight is used once a token; what the 3B model has is known."""
    assert QWEN25_VL_3B.text_macs == pytest.approx(2.77e9, rel=0.01)
    assert QWEN25_VL_3B.vision_macs / 4 == pytest.approx(0.63e9, rel=0.05)


def test_the_tower_runs_for_full_recompute_only() -> None:
    report = vision.run(divide=1, width=112, height=112, repeats=1, repair="none", whole=SMALL)
    assert report["repair"] == "none"
    behind, around = report["layouts"].values()
    for layout in (behind, around):
        assert layout["image_tokens"] == 16
        full, prefix, kvshare = layout["methods"].values()
        assert full["computed_tokens"] == layout["tokens"]
        assert (full["tower_runs"], full["picture"]) == (1, "encoder")
        assert full["tower_s"] > 0
        assert full["times_sooner"] == 1
        for method in (prefix, kvshare):
            assert method["tower_runs"] == 0
            assert method["ttft_s"] > 0
        assert kvshare["picture"] == "kv"
    assert behind["methods"]["prefix"]["picture"] == "kv"
    # Behind a name that differs there is no prefix, but the features are known.
    assert around["methods"]["prefix"]["picture"] == "features"
    kvshare, prefix = (around["methods"][name] for name in ("kvshare", "prefix"))
    assert kvshare["computed_tokens"] < prefix["computed_tokens"] / 2


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vision.run, "__kwdefaults__", {**vision.run.__kwdefaults__, "whole": SMALL})
    out = tmp_path / "vision.json"
    options = ["--divide", "1", "--width", "56", "--height", "56", "--repeats", "1"]
    done = run("bench", "vision", *options, "--json", out)
    assert done.exit_code == 0, done.output
    assert "question" in done.output
    assert set(json.loads(out.read_text())["layouts"]) == set(vision.layouts(b""))
