"""What commands share: errors in one sentence, tables, and a file for what they found."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvshare_mm.errors import KVShareError

console = Console()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can act on, as one sentence and exit code 1."""
    try:
        yield
    except KVShareError as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def report_file(path: Path | None) -> Path | None:
    """The path, if a report can be written there; known before anything is measured."""
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("a").close()
            if is_new:  # a run that is killed must not leave what looks like a result
                path.unlink()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    return path


def write_report(report: dict[str, Any], out: Path | None) -> None:
    """Write a report as JSON, if a file was asked for, with the command and the machine."""
    if out:
        from kvshare_mm.apps.machine import machine

        report = {**report, "machine": machine(), "command": _command(sys.argv)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2), encoding="utf-8")
        console.print(f"Report written to {out}", markup=False)


# Options with their values: what is nobody's business, and what nobody must read.
_LEFT_OUT = ("--json", "--key", "--api-key")


def _command(argv: list[str]) -> str:
    """As somebody else would type it: no folders of this machine, no report's name, no key."""
    words = ["kvshare"]
    given = iter(argv[1:])
    for word in given:
        name, equals, _ = word.partition("=")
        if name not in _LEFT_OUT:
            words.append(word if "://" in word else word.rpartition("/")[2])
        elif not equals:
            next(given, None)
    return shlex.join(words)


def audited(family: Mapping[str, Any]) -> tuple[str, str, str]:
    """What audits found of a family: how many there were, how many within the bound, the factor."""
    within = f"{1 - family['misses'] / family['audits']:.0%}"
    factor = "given up" if family["shut"] else f"{family['factor']:.2g}"
    return str(family["audits"]), within, factor


def print_table(title: str, rows: Sequence[Sequence[str]], console: Console = console) -> None:
    """A table, headings first, that breaks text between words and never inside them.

    Where even so its columns do not fit, its rows stand one below the other, each value behind its
    heading.
    """
    columns = list(zip(*rows, strict=True))
    found = _fitting(columns, console.width)
    headings, *below = rows
    if found is None:
        console.print(escape(title), style="italic")
        for (_, first), *others in (list(zip(headings, row, strict=True)) for row in below):
            said = ", ".join(f"{heading} {value}" for heading, value in others)
            console.print(f"[bold]{escape(first)}[/]: {escape(said)}")
        return
    widths, gap = found
    shown = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, gap - 1, 0, 0))
    shown.show_edge = False
    for i, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        shown.add_column(heading, justify="right" if i else "left", width=width)
    for row in below:
        shown.add_row(*map(escape, row))
    console.print(shown)


def _fitting(columns: Sequence[Sequence[str]], room: int) -> tuple[list[int], int] | None:
    """The columns' widths and the gap between them: the longest word of each at least, and all of
    its longest cell where that needs least."""
    longest = [max(map(len, " ".join(cells).split()), default=1) for cells in columns]
    widest = [max(1, *map(len, cells)) for cells in columns]
    for gap in 2, 1:
        spare = room - (gap * len(columns) - 1) - sum(longest)
        if spare < 0:
            continue
        widths = longest.copy()
        for i in sorted(range(len(columns)), key=lambda i: widest[i] - longest[i]):
            more = min(spare, widest[i] - longest[i])
            widths[i] += more
            spare -= more
        return widths, gap
    return None
