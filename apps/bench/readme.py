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
    ``<!-- results: NAME; HEADING | HEADING -->``, of these columns alone. ``NAME/PART`` is one of
    the further tables of a result. A block of which a result is not there stays as it is.

    Args:
        results: by name, as `report.read_results` gives them.

    Returns:
        The page, and the names that were not found.

    Raises:
        ConfigError: the page has no block, or one names results whose tables differ in columns, or
            a column or a table that there is not.
    """
    if not _BLOCK.search(page):
        raise ConfigError("the page has no block <!-- results: NAME --> ... <!-- /results -->")
    missing: list[str] = []

    def block(match: re.Match[str]) -> str:
        listed, _, wanted = match[1].partition(";")
        names = listed.split()
        absent = [name for name in names if name.partition("/")[0] not in results]
        missing.extend(absent)
        if absent:
            return match[0]
        tables = [_table(results, name) for name in names]
        commands = [results[name.partition("/")[0]].get("command") for name in names]
        body = _markdown(tables, commands, listed, wanted)
        return f"<!-- results: {match[1]} -->\n{body}<!-- /results -->"

    return _BLOCK.sub(block, page), missing


def _table(results: dict[str, dict[str, Any]], name: str) -> Rows:
    result, _, part = name.partition("/")
    kind = TABLES[results[result]["kind"]]
    if part and part not in kind.parts:
        raise ConfigError(f"{result} has no table {part!r}")
    return (kind.parts[part] if part else kind).rows(results[result])


def _markdown(tables: list[Rows], commands: list[str | None], names: str, wanted: str) -> str:
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
    sources = [f"`{command}`" for command in dict.fromkeys(commands) if command]
    return "\n".join([*lines, "", *([", ".join(sources), ""] if sources else [])])
