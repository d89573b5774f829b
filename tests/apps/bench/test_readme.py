"""Results as tables of a Markdown page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.cli import bench
from kvshare_mm.apps.bench.readme import filled

from .test_report import RESULTS


def template(tokens: int) -> dict[str, Any]:
    return {
        "kind": "template", "model": "smollm2", "tokens": tokens, "values": 8, "computed": 71,
        "kept_share": 0.957, "kvshare_times_sooner": 4.06, "kvshare_of_ideal": 1.038,
        "repeat_times_sooner": 12.03, "command": f"kvshare bench template --tokens {tokens}",
        "ttft_s": {"full": 0.855, "kvshare": 0.2107, "ideal": 0.2, "repeat": 0.0071},
    }  # fmt: skip


MEMORY = {
    "kind": "memory", "model": "smollm2", "requests": 100, "bytes_owned": 197 << 20,
    "bytes_packed": 52 << 20, "bytes_whole": 2054 << 20, "times_less": 10.43,
    "within_budget": True,
    "rss_before_bytes": 1 << 20, "rss_peak_bytes": 209 << 20,
}  # fmt: skip
PAGE = """A
<!-- results: a b -->
old
<!-- /results -->
B
<!-- results: c -->
<!-- /results -->
"""


def test_blocks_are_filled_and_filled_again() -> None:
    results = {"a": template(471), "b": template(902)}
    page, missing = filled(PAGE, results)
    assert missing == ["c"]
    assert "old" not in page
    assert page.endswith("B\n<!-- results: c -->\n<!-- /results -->\n")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| 471 tokens | 8 (96% kept) | 71 | 855 ms | 211 ms | 4.1 | 1.04 |")
    assert "`kvshare bench template --tokens 471`, `kvshare bench template --tokens 902`" in page
    assert filled(page, results) == (page, ["c"])
    page, missing = filled(page, {"a": template(5), "b": template(6), "c": MEMORY})
    assert missing == []
    assert "| 100 | 197 MiB | 52 MiB | 2054 MiB | 10.4 | 208 MiB | yes |" in page
    assert "471" not in page


def test_a_page_may_show_some_columns() -> None:
    page = "<!-- results: c; times less | requests stored -->\n<!-- /results -->"
    shown, _ = filled(page, {"c": MEMORY})
    head, _, row, *_ = shown.splitlines()[1:]
    assert (head, row) == ("| times less | requests stored |", "| 10.4 | 100 |")
    assert filled(shown, {"c": MEMORY}) == (shown, [])
    with pytest.raises(ConfigError, match="c has no column 'times more'"):
        filled(page.replace("less", "more"), {"c": MEMORY})


def test_tables_that_do_not_fit_and_pages_without_a_place() -> None:
    with pytest.raises(ConfigError, match="a b have different columns"):
        filled(PAGE, {"a": MEMORY, "b": template(4)})
    with pytest.raises(ConfigError, match="no block"):
        filled("a page", {})
    with pytest.raises(ConfigError, match="c has no table 'more'"):
        filled("<!-- results: c/more -->\n<!-- /results -->", {"c": MEMORY})


def test_by_command(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(MEMORY))
    (tmp_path / "frontier.json").write_text(json.dumps(RESULTS["frontier-a"]))
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    out = tmp_path / "r.html"
    args = ["report", "--in", str(tmp_path), "--out", str(out), "--readme", str(page)]
    args += ["--figures", str(tmp_path / "figures")]
    told = CliRunner().invoke(bench, args)
    assert told.exit_code == 0, told.output
    assert "not measured: a, b" in told.output
    assert "| 100 | 197 MiB |" in page.read_text() and "old" in page.read_text()
    assert "197 MiB" in out.read_text()
    assert len(list((tmp_path / "figures").iterdir())) == 2
