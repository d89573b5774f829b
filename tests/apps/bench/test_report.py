"""Results as figures and one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.figures import figure_of
from kvshare_mm.apps.bench.report import page, read_results, sections, write_figures
from kvshare_mm.apps.bench.theme import DARK, LIGHT

_MACHINE = {"cpu": "A <fast> CPU", "threads": 2, "gpu": None, "torch": "2", "transformers": "5"}


def point(policy: str, work: float, kl: float) -> dict[str, Any]:
    return {"policy": policy, "computed_share": work, "work_share": work,
            "kl_first_token": {"mean": kl, "p50": kl, "p90": kl},
            "first_token_agreement": 0.9}  # fmt: skip


def quality(task: str, model: str, facts: bool) -> dict[str, Any]:
    def method(score: float) -> dict[str, Any]:
        span = {"estimate": score, "low": score - 5, "high": score + 5}
        leaks = {"leaks": 3, "full_states_new_fact": 40} if facts else {}
        return {"score": span, "difference_to_full": span, "significant": True,
                "same_answer": 0.5, "computed_share": 0.31, **leaks}  # fmt: skip

    return {"kind": "quality", "machine": _MACHINE, "model": model, "task": task, "items": 50,
            "metric": "BLEU", "methods": {"full": method(40), "kvshare": method(39)}}  # fmt: skip


RESULTS: dict[str, dict[str, Any]] = {
    "frontier-a": {
        "kind": "frontier", "machine": _MACHINE, "model": "smollm2", "pairs": 7,
        "methods": {
            "prefix": [point("default", 0.6, 0.0)],
            "epic": [point("window:2", 0.2, 0.05), point("window:8", 0.4, 0.0123)],
            "repair=tail:4": [point("tail:4", 0.3, 0.07)],
        },
    },
    "hitrate": {
        "kind": "hitrate", "machine": _MACHINE, "stream": "bank", "prompts": 9, "measured": 4,
        "pool_sizes": {
            size: {
                "methods": {
                    name: {"token_share": share, "prompt_share": share, "shares": [0, 0, share],
                           "planner_ms": {"p50": 1.5, "p99": 2.5}}
                    for name, share in (("prefix", 0.11), ("kvshare", 0.22))
                },
                "gptcache_hit_rate": 0.33,
            }
            for size in ("10", "100")
        },
    },
    "q1": quality("translation", "small", False),
    "q2": quality("reports", "small", True),
    "q3": quality("reports", "/models/Big_1.gguf", True),
    "reliable": {
        "kind": "reliability", "model": "smollm2", "predicted": [0.01, 0.02, 0.0],
        "observed": [0.02, 0.01, 0.0], "skipped": [],
        "bound": {"scale": 33.0, "power": 1.0}, "fitted": {"scale": 20.0, "power": 0.9, "pairs": 6},
        "checked": {"auto:0.01": {
            "pairs": 4, "kl_first_token_mean": 0.0021, "kl_within_target": 0.975,
            "first_token_agreement": 0.95, "computed_share": 0.4, "computed_of_prefix": 0.6,
            "reused_of_reusable": 0.8,
        }},
    },
    "reuse": {
        "kind": "reuse", "machine": _MACHINE, "model": "smollm2", "pairs": 3,
        "methods": {
            "kvshare": {
                "ttft_s": {"median": 0.123, "p90": 0.2}, "speedup_vs_full": 3.4,
                "computed_share": 0.4, "work_share": 0.5,
                "kl_first_token": {"mean": 0.0042, "p50": 0, "p90": 0.0101},
                "first_token_agreement": 0.97, "greedy_agreement": 0.88,
                "kv_deviation": {"key": [0.0, 0.1], "value": [0.0, 0.2], "positions": 9},
            }
        },
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, report in RESULTS.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    (folder / "running.json").write_text("")
    (folder / "lookup.json").write_text('{"records": 4}')
    return folder


def test_one_page_of_everything(folder: Path) -> None:
    html = page(sections(read_results(folder)))
    for text in ("Divergence against work, 7 pairs, smollm2", "0.0123", "window:8",
                 "Hit rate: bank, 4 of 9 prompts", "22.0%", "33.0%", "2.5 ms",
                 "translation, 50 items", "+39.0 (+34.0 to +44.0)", "3 of 40",
                 "123 ms", "A &lt;fast&gt; CPU, 2 threads"):  # fmt: skip
        assert text in html, text
    assert "<script" not in html
    # Nothing is fetched: links point inside the page, and the namespaces are only names.
    assert set(re.findall(r'(?:href|src)="([^#"][^"]*)"', html)) == set()
    assert "url(http" not in html
    assert html.count("<svg") == 2 * 6
    # Ids of different figures do not meet.
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert clips and len(clips) == len(set(clips))


def test_figures_for_light_and_dark(folder: Path, tmp_path: Path) -> None:
    written = write_figures(sections(read_results(folder)), tmp_path / "new" / "assets")
    assert sorted(path.name for path in written) == [
        f"{name}-{theme}.svg"
        for name in ("frontier-a", "hitrate", "quality-big-1", "quality-small", "reliable", "reuse")
        for theme in ("dark", "light")
    ]
    for path in written:
        text = path.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        theme, other = (DARK, LIGHT) if "-dark" in path.name else (LIGHT, DARK)
        assert theme.background in text
        assert other.background not in text


def test_a_figure_is_the_same_every_time_or_there_is_none() -> None:
    one, two = (figure_of("f", RESULTS["frontier-a"]) for _ in range(2))
    assert one == two
    assert one is not None
    plain = json.loads(json.dumps(RESULTS["reuse"]))
    plain["methods"]["kvshare"]["kv_deviation"] = None
    assert figure_of("r", plain) is None


def test_what_is_no_folder_of_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="has no results"):
        read_results(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x\.json is no JSON"):
        read_results(tmp_path)


def test_several_models_are_one_picture(tmp_path: Path) -> None:
    one = {**RESULTS["frontier-a"], "command": "first"}
    ours = [point("default", 0.42, 0.0011), point("auto:0.1", 0.2, 0.03)]
    windows = [point("window:16", 0.37, 0.0158), point("window:2", 0.2, 0.09)]
    other = {**one, "model": "/models/Big_1.gguf", "command": "second",
             "methods": {"kvshare": ours, "epic": windows}}  # fmt: skip
    for name, report in (("a", one), ("b", other), ("c", {**one, "what": "long prompts"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    results = read_results(tmp_path)
    assert results["frontier-models"]["command"] == "first, second"
    part = sections(results)[-1]
    assert part.rows[1:] == [
        ["Big_1", "KVShare", "default", "42%", "0.0011", "0.0011", "90%"],
        ["Big_1", "EPIC-style", "window:16", "37%", "0.0158", "0.0158", "90%"],
    ]
    assert part.figure is not None
    for text in (part.figure.light, part.figure.dark):
        assert "Big_1" in text and "smollm2" in text
    (tmp_path / "b.json").unlink()
    assert "frontier-models" not in read_results(tmp_path)
