"""Tables of results in a Markdown page, each between two comments that name the results."""

from __future__ import annotations

import re
from typing import Any

from kvshare_mm.apps.bench.tables import TABLES, Rows
from kvshare_mm.errors import ConfigError

_BLOCK = re.compile(r"<!-- results: ([^\n]*?) -->\n(.*?)<!-- /results -->", re.DOTALL)


def filled(page: str, results: dict[str, dict[str, Any]]) -> tuple[str, list[str]]:
    """Put results into a page.

    A block from ``<!-- results: NAME NAME -->`` to ``<!-- /results -->`` gets the table of these
    results, one below the other, and the commands that measured them; with
    ``<!-- results: NAME; HEADING | HEADING -->``, of these columns alone. A block of which a result
    is not there stays as it is.

    Args:
        results: by name, as `report.read_results` gives them.

    Returns:
        The page, and the names that were not found.

    Raises:
        ConfigError: the page has no block, or one names results whose tables differ in columns, or
            a column that there is not.
    """
    if not _BLOCK.search(page):
        raise ConfigError("the page has no block <!-- results: NAME --> ... <!-- /results -->")
    missing: list[str] = []

    def block(match: re.Match[str]) -> str:
        listed, _, wanted = match[1].partition(";")
        names = listed.split()
        absent = [name for name in names if name not in results]
        missing.extend(absent)
        if absent:
            return match[0]
        body = _markdown([results[name] for name in names], listed, wanted)
        return f"<!-- results: {match[1]} -->\n{body}<!-- /results -->"

    return _BLOCK.sub(block, page), missing


def _markdown(reports: list[dict[str, Any]], names: str, wanted: str) -> str:
    tables = [TABLES[report["kind"]].rows(report) for report in reports]
    headings = tables[0][0]
    if any(table[0] != headings for table in tables):
        raise ConfigError(f"the tables of {names} have different columns")
    if wanted:
        shown = [heading.strip() for heading in wanted.split("|")]
        if unknown := [heading for heading in shown if heading not in headings]:
            raise ConfigError(f"the table of {names} has no column {unknown[0]!r}")
        places = [headings.index(heading) for heading in shown]
        tables = [[[row[i] for i in places] for row in table] for table in tables]
        headings = shown
    rows: Rows = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    rows += [row for table in tables for row in table[1:]]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    commands = dict.fromkeys(r["command"] for r in reports if r.get("command"))
    sources = [f"`{command}`" for command in commands]
    return "\n".join([*lines, "", *([", ".join(sources), ""] if sources else [])])
