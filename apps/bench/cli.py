"""`kvshare bench ...`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvshare_mm.errors import KVShareError

bench = typer.Typer(help="Measure: speed, fidelity, lookup, overhead.", no_args_is_help=True)
console = Console()

Model = Annotated[str, typer.Option(help="hub name, folder, .gguf file, or the embedded smollm2")]
Out = Annotated[Path | None, typer.Option("--json", help="write the report to this file")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except KVShareError as error:
        Console(stderr=True).print(f"[red]Error:[/] {error}", soft_wrap=True)
        raise typer.Exit(1) from error


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2), encoding="utf-8")
        console.print(f"Report written to {out}")


@bench.command()
def reuse(
    pairs: Annotated[
        Path, typer.Option("--pairs", help='JSON Lines of {"id", "donor", "target", "reference"}')
    ],
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option(help="comma-separated; repair=POLICY measures a repair policy")
    ] = "full,prefix,placeholders,cacheblend,epic,kvshare",
    limit: Annotated[int | None, typer.Option(min=1, help="use the first N pairs")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens compared")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="timings a method")] = 3,
    json_file: Out = None,
) -> None:
    """Methods side by side on pairs of similar prompts: first-token time, tokens computed,
    divergence from full recompute."""
    from kvshare_mm.apps.bench import reuse as bench_reuse
    from kvshare_mm.apps.bench.methods import pick
    from kvshare_mm.apps.bench.rig import Rig
    from kvshare_mm.config import KVShareConfig

    with _plain_errors():
        chosen, rows = pick(methods), bench_reuse.read_pairs(pairs, limit)
        console.print(f"Loading [bold]{model}[/] ...")
        rig = Rig(KVShareConfig.of(model=model, embedder=None))
        try:
            report = bench_reuse.run(
                rig, rows, chosen, max_new_tokens=max_new_tokens, repeats=repeats
            )
        finally:
            rig.close()
        table = Table(title=f"{report['pairs']} pairs, {model}")
        for heading in ("method", "first token", "times sooner", "computed", "KL mean / p90",
                        "first token same", "greedy same"):  # fmt: skip
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for name, m in report["methods"].items():
            kl = m["kl_first_token"]
            table.add_row(
                name,
                f"{1000 * m['ttft_s']['median']:.0f} ms",
                f"{m['speedup_vs_full']:.1f}",
                f"{m['computed_share']:.0%}",
                f"{kl['mean']:.4f} / {kl['p90']:.4f}",
                f"{m['first_token_agreement']:.0%}",
                f"{m['greedy_agreement']:.0%}",
            )
        console.print(table)
        if report["skipped"]:
            console.print(f"{len(report['skipped'])} pairs were skipped; the report says why")
        _write(report, json_file)
