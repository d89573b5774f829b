"""Tables in a terminal of 80 columns: their words stay whole."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from kvshare_mm.apps.bench.tables import TABLES
from kvshare_mm.apps.terminal import print_table

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "README.md", ROOT / "apps" / "bench" / "README.md")


def printed(rows: list[list[str]], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table("What was [measured]", rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def measured() -> dict[str, list[list[str]]]:
    """The tables of the pages, by the names of their results."""
    tables = {}
    for page in PAGES if PAGES[0].exists() else ():
        for names, block in re.findall(
            r"<!-- results: (.*?) -->\n(.*?)<!-- /results -->", page.read_text("utf-8"), re.S
        ):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
            tables[names] = [rows[0], *rows[2:]]
    return tables


_HEADINGS = {
    name: [list(kind.columns), ["some words", *["99.9%"] * (len(kind.columns) - 1)]]
    for name, kind in TABLES.items()
    if isinstance(kind.columns, dict)
}


@pytest.mark.parametrize("rows", [pytest.param(rows, id=f"{where} {name}")
    for where, tables in (("page", measured()), ("kind", _HEADINGS))
    for name, rows in tables.items()])  # fmt: skip
def test_no_word_is_broken_at_80_columns(rows: list[list[str]]) -> None:
    shown = printed(rows)
    assert max(map(len, shown.splitlines())) <= 80
    assert "─" in shown  # as a table
    words = shown.split()
    for cell in (cell for row in rows for cell in row):
        assert [word for word in cell.split() if word not in words] == []


def test_what_fits_nowhere_is_told_row_by_row() -> None:
    rows = [["method", *[f"heading{i}" for i in range(12)]], ["prefix", *map(str, range(12))]]
    shown = printed(rows)
    assert "─" not in shown
    assert "prefix: heading0 0, heading1 1, heading2 2" in " ".join(shown.split())
