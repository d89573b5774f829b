"""What the benchmark commands share: options, a rig, and what becomes of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from kvshare_mm.apps.terminal import (
    console,
    plain_errors,
    print_table,
    report_file,
    write_report,
)
from kvshare_mm.models.names import refuse_unknown

if TYPE_CHECKING:
    from kvshare_mm.apps.bench.rig import Rig

Report = dict[str, Any]

Model = Annotated[str, typer.Option(help="hub name, folder, .gguf file, or the embedded smollm2")]
Repair = Annotated[
    str | None, typer.Option(help="repair policy of the method kvshare; default: the project's")
]
Engine = Annotated[
    Literal["native", "vllm"],
    typer.Option(help="vllm: vLLM with KVShare in it beside vLLM as it comes"),
]
Limit = Annotated[int | None, typer.Option(min=1, help="use the first N")]
Pairs = Annotated[
    Path, typer.Option("--pairs", help='JSON Lines of {"id", "donor", "target", "reference"}')
]
HeldOut = Annotated[
    bool,
    typer.Option("--held-out", help="only the 40% of the pairs that nothing is fitted to"),
]
Repeats = Annotated[int, typer.Option(min=1, help="measurements of each")]
Seed = Annotated[int, typer.Option(min=0, help="of all that is drawn")]
Embedder = Annotated[str, typer.Option(help="sentence-transformers model")]
Out = Annotated[
    Path | None,
    typer.Option("--json", help="write the report to this file", callback=report_file),
]


def measuring(command: Callable[..., Report]) -> Callable[..., None]:
    """A command that returns a report, and takes where to write it as ``json_file``.

    The report is shown as the tables of its kind and written, and what was kept in case the run is
    killed is dropped. Errors that a user can act on end it in one sentence; a report of errors
    ends it with code 1.
    """

    @wraps(command)
    def run(**options: Any) -> None:
        from kvshare_mm.apps.bench.journal import Journal

        with plain_errors():
            if options.get("model"):
                refuse_unknown(options["model"])
            report = command(**options)
            show(report)
            write_report(report, options["json_file"])
            Journal.forget(options["json_file"])
            if report.get("errors"):
                raise typer.Exit(1)

    return run


@contextmanager
def opened_rig(model: str, num_slots: int = 1, **options: Any) -> Iterator[Rig]:
    """A rig, closed in the end, with a word on what takes time. Options of None are not given."""
    from kvshare_mm.apps.bench.rig import Rig
    from kvshare_mm.config import KVShareConfig

    given = {name: value for name, value in options.items() if value is not None}
    config = KVShareConfig.of(model=model, **given)
    console.print(f"Loading [bold]{escape(model)}[/] ...")
    rig = Rig(config, num_slots)
    try:
        yield rig
    finally:
        rig.close()


def show(report: Report) -> None:
    """The tables of a report, as `tables` has them for its kind."""
    from kvshare_mm.apps.bench.tables import TABLES

    kind = TABLES[report["kind"]]
    for table in (kind, *kind.parts.values()):
        print_table(table.heading(report), table.rows(report))
    for error, count in report.get("errors", {}).items():
        console.print(f"[red]{count} failed:[/] {escape(error)}")
    if report.get("skipped"):
        console.print(f"{len(report['skipped'])} were skipped; the report says why")
