"""What the benchmark commands share: options, a rig, errors in one sentence, the report file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from kvshare_mm.apps.terminal import console, plain_errors, report_file, write_report

__all__ = ["console", "plain_errors", "write_report"]

if TYPE_CHECKING:
    from kvshare_mm.apps.bench.rig import Rig

Model = Annotated[str, typer.Option(help="hub name, folder, .gguf file, or the embedded smollm2")]
Repair = Annotated[
    str | None, typer.Option(help="repair policy of the method kvshare; default: the project's")
]
Engine = Annotated[
    Literal["native", "vllm"],
    typer.Option(help="vllm: vLLM with KVShare in it beside vLLM as it comes"),
]
Limit = Annotated[int | None, typer.Option(min=1, help="use the first N pairs")]


Out = Annotated[
    Path | None,
    typer.Option("--json", help="write the report to this file", callback=report_file),
]


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
