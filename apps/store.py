"""``kvshare store``: is a store folder whole, and what is lost if not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from kvshare_mm.apps.terminal import plain_errors

if TYPE_CHECKING:
    from kvshare_mm.reuse.check import Report

store = typer.Typer(
    help="Check a store folder (`--store-dir`) and put it right, without loading a model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
console = Console()

Folder = Annotated[Path, typer.Argument(help="a store folder: what `--store-dir` was")]
AsJson = Annotated[bool, typer.Option("--json", help="print the report as JSON")]

_MEANT = {
    "damaged": "damaged: its content is not what was written",
    "older_format": "of an older version of KVShare",
    "newer_format": "of a later version of KVShare; it stays",
    "unreadable": "the disk did not give it this time; it stays",
    "wrong_borrowing": "borrows KV that its owner does not have",
    "temporary": "left by a write that was cut off",
    "set_aside": "a calibration that a server could not read",
}


@store.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read every file, byte by byte, and say what is wrong; **nothing is changed**.

    Checked: the checksums of all donors and of what audits taught, format versions, whether each
    donor's borrowed KV is there, and what killed processes left. A running server is not disturbed.

    Ends with 1 if something is wrong. Donors whose owner was evicted are not wrong: what they
    borrowed is computed again.
    """
    from kvshare_mm.reuse import check

    with plain_errors(), _bar(folder, as_json) as read:
        report = check.verify(folder, read)
    _show(report, as_json)
    if not report.ok:
        if not as_json and any(p.broken for p in report.problems):
            console.print(f"`kvshare store repair {folder}` removes what is broken.", markup=False)
        raise typer.Exit(1)


@store.command()
def repair(
    folder: Folder,
    quarantine: Annotated[
        Path | None,
        typer.Option(help="move broken files to this folder, on the same disk, instead"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove what `verify` calls broken, and nothing else; refused while a server uses the folder.

    What is removed would be a miss anyway: requests are computed in full and stored again. Files of
    a later version, and those that the disk did not give this time, stay.
    """
    from kvshare_mm.reuse import check

    with plain_errors(), _bar(folder, as_json) as read:
        report = check.repair(folder, quarantine, read)
    _show(report, as_json)
    gone = [problem for problem in report.problems if problem.broken]
    if not as_json and gone:
        tokens = sum(problem.tokens or 0 for problem in gone)
        unknown = sum(problem.tokens is None for problem in gone)
        more = f", and of {unknown} files nobody knows how many" if unknown else ""
        went = f"moved to {quarantine}" if quarantine else "removed"
        console.print(f"{len(gone)} files {went}: {tokens} tokens of KV lost{more}", markup=False)


@contextmanager
def _bar(folder: Path, quiet: bool) -> Iterator[Callable[[int], object]]:
    from kvshare_mm.reuse import check

    total = check.num_bytes(folder)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=quiet) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
        return
    media = f" and {report.media} encoder outputs" if report.media else ""
    console.print(
        f"{report.donors} donors{media}, {report.bytes['nodes'] / 2**20:.1f} MiB; "
        f"{report.tokens_owned} tokens held, {report.tokens_readable} if each were stored whole"
        + ("; a server uses the folder" if report.in_use else "")
    )
    if report.tokens_missing:
        console.print(
            f"{report.donors_missing_some} donors borrowed {report.tokens_missing} tokens from "
            "others that are gone, evicted or lost: those will be computed"
        )
    if report.ok:
        console.print("[green]Nothing is wrong.[/]")
        return
    table = Table()
    for heading in ("file", "tokens", "what is wrong"):
        table.add_column(heading, overflow="fold")
    for problem in report.problems:
        name = str(problem.path.relative_to(report.folder))
        tokens = "?" if problem.tokens is None else str(problem.tokens)
        table.add_row(escape(name), tokens, _MEANT[problem.kind])
    console.print(table)
