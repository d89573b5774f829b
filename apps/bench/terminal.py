"""What the benchmark commands share: options, a rig, errors in one sentence, the report file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvshare_mm.errors import KVShareError

if TYPE_CHECKING:
    from kvshare_mm.apps.bench.rig import Rig

console = Console()

Model = Annotated[str, typer.Option(help="hub name, folder, .gguf file, or the embedded smollm2")]
Repair = Annotated[
    str | None, typer.Option(help="repair policy of the method kvshare; default: the project's")
]
Engine = Annotated[
    Literal["native", "vllm"],
    typer.Option(help="vllm: vLLM with KVShare in it beside vLLM as it comes"),
]
Limit = Annotated[int | None, typer.Option(min=1, help="use the first N pairs")]


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


Out = Annotated[
    Path | None,
    typer.Option("--json", help="write the report to this file", callback=report_file),
]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can act on, as one sentence and exit code 1."""
    try:
        yield
    except KVShareError as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def opened_rig(model: str, num_slots: int = 1, **options: Any) -> Iterator[Rig]:
    """A rig without dense search, closed in the end, with a word on what takes time."""
    from kvshare_mm.apps.bench.rig import Rig
    from kvshare_mm.config import KVShareConfig

    config = KVShareConfig.of(model=model, embedder=None, **options)
    console.print(f"Loading [bold]{escape(model)}[/] ...")
    rig = Rig(config, num_slots=num_slots)
    try:
        yield rig
    finally:
        rig.close()


def write_report(report: dict[str, Any], out: Path | None) -> None:
    """Write a report as JSON, if a file was asked for, with the command that made it."""
    if out:
        report = {**report, "command": _command(sys.argv)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2), encoding="utf-8")
        console.print(f"Report written to {out}", markup=False)


def _command(argv: list[str]) -> str:
    """As somebody else would type it: no folders of this machine, and no name of the report."""
    words = ["kvshare", *(w if "://" in w else w.rpartition("/")[2] for w in argv[1:])]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(words)


def table(title: str, *headings: str) -> Table:
    """A table whose first column is a name and whose others are figures."""
    made = Table(title=escape(title))
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    return made


def show(report: dict[str, Any]) -> None:
    """The table of a report, as `tables` has it for its kind."""
    from kvshare_mm.apps.bench.tables import TABLES

    kind = TABLES[report["kind"]]
    headings, *rows = kind.rows(report)
    shown = table(kind.title(report), *headings)
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    say_skipped(report)


def say_skipped(report: dict[str, Any]) -> None:
    """How many inputs were left out, if any."""
    if report.get("skipped"):
        console.print(f"{len(report['skipped'])} were skipped; the report says why")
