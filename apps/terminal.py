"""What commands share: errors in one sentence, and a file for what they found."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

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
