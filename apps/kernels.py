"""`kvshare kernels ...`"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvshare_mm.apps.terminal import plain_errors, report_file
from kvshare_mm.errors import ConfigError

kernels = typer.Typer(help="The GPU kernels.", no_args_is_help=True)
console = Console()


@kernels.callback()
def group() -> None:
    """The GPU kernels."""


@kernels.command("compile")
def compile_command(
    target: Annotated[str, typer.Option(help="chip: sm_80, sm_90, sm_100 or gfx942")] = "sm_90",
    all_tiles: Annotated[
        bool, typer.Option("--all-tiles", help="also tiles that fit and are not chosen")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="write the table to this file", callback=report_file),
    ] = None,
) -> None:
    """Compile every kernel for a GPU that need not be there: registers, spills, shared memory.

    Exit code 1 if a kernel spills or needs more shared memory than the chip has.
    """
    from kvshare_mm.kernels.backend import BackendError
    from kvshare_mm.kernels.compile import compile_kernels
    from kvshare_mm.kernels.tiles import SHARED_BYTES

    with plain_errors():
        try:
            with console.status(f"Compiling for {target} ..."):
                compiled = list(compile_kernels(target, all_tiles))
        except BackendError as error:
            raise ConfigError(str(error)) from error
        table = Table(title=f"{target}, {SHARED_BYTES[target]:,} bytes of shared memory")
        table.add_column("kernel")
        for heading in ("registers", "spills", "shared bytes"):
            table.add_column(heading, justify="right")
        for c in compiled:
            style = None if c.fits else "bold red"
            row = (c.name, str(c.registers), str(c.spills), f"{c.shared_bytes:,}")
            table.add_row(*row, style=style)
        console.print(table)
        if json_file:
            report = {"kernels": [asdict(c) for c in compiled]}
            json_file.write_text(json.dumps(report, indent=2), encoding="utf-8")
        bad = [c.name for c in compiled if not c.fits]
        if bad:
            raise ConfigError(f"these do not fit {target}: {'; '.join(bad)}")
