"""`kvshare models ...`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvshare_mm.apps.terminal import plain_errors, report_file, write_report

models = typer.Typer(help="Which models share KV.", no_args_is_help=True)
console = Console()


@models.callback()
def group() -> None:
    """Which models share KV."""


@models.command()
def check(
    name: Annotated[
        str, typer.Argument(help="hub name, folder with a config.json, .gguf file, or smollm2")
    ],
    trust_remote_code: Annotated[bool, typer.Option(help="run model code from the hub")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="also write the results to this file", callback=report_file),
    ] = None,
) -> None:
    """Can KV of a model be shared, and how much room does it take? From its configuration alone.

    A small random model of the same architecture is put to the proof that every model goes through
    when it is loaded. Exit code 1 if nothing can be shared.
    """
    from transformers.utils import logging as hf_logging

    from kvshare_mm.models.check import check_model

    hf_logging.set_verbosity_error()
    with plain_errors(), console.status(f"Trying a small model of {name}'s kind ..."):
        checked = check_model(name, trust_remote_code=trust_remote_code)
    table = Table(show_header=False, box=None)
    table.add_row("architecture", checked.model_type)
    if checked.shape is None and checked.exact:
        how = ": state checkpoints" if checked.state_bytes else ""
        table.add_row("reuse", f"[yellow]exact prefix only[/]{how}")
        table.add_row("why", checked.reason)
        if checked.state_bytes:
            table.add_row("a checkpoint", f"{checked.state_bytes:,} bytes beside its KV")
    elif checked.shape is None:
        table.add_row("reuse", f"[red]none[/]: {checked.reason}")
    else:
        table.add_row("reuse", "[green]similar and exact[/]")
        table.add_row("windows", "in some layers" if checked.windows else "none")
        table.add_row("media", ", ".join(m.value for m in checked.media) or "text alone")
        shape, size = checked.shape, checked.bytes_per_token or 0
        dims = " + ".join(str(d) for d in (shape.key_dim, shape.value_dim))
        table.add_row(
            "KV of a token",
            f"{shape.num_layers} layers x {shape.num_kv_heads} heads x ({dims}), "
            f"{str(checked.dtype).removeprefix('torch.')}: {size:,} bytes",
        )
        table.add_row("tokens in a GiB", f"{(1 << 30) // size:,}")
    if checked.context_len:
        table.add_row("context", f"{checked.context_len:,} tokens")
    console.print(table)
    shown = asdict(checked) | {
        "dtype": str(checked.dtype).removeprefix("torch."),
        "media": [m.value for m in checked.media],
        "bytes_per_token": checked.bytes_per_token,
    }
    write_report(shown, json_file)
    if not checked.exact:
        raise typer.Exit(1)
