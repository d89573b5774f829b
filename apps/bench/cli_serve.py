"""`kvshare bench serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from kvshare_mm.apps.bench.terminal import Out, console, plain_errors, table, write_report


def serve(
    requests: Annotated[
        Path, typer.Option("--requests", help='JSON Lines of {"text"} or of chat bodies')
    ],
    url: Annotated[
        str, typer.Option(help="any server with OpenAI's API")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="default: the server's first")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="KVSHARE_API_KEY", help="API key of the server")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="clients at the same time")] = 8,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="requests a second instead, at random times")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="send the first N requests")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="send all of them so often")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="answers of that length exactly")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random times")] = 0,
    json_file: Out = None,
) -> None:
    """Load a running server and report what its clients feel."""
    from kvshare_mm.apps.bench.serve import Load, Sample, read_requests, run_load, summary

    with plain_errors():
        bodies = read_requests(requests, limit) * repeat
        load = Load(concurrency, rate, max_tokens, ignore_eos, seed=seed)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("requests", total=len(bodies))

            def done(_: Sample) -> None:
                progress.advance(task)

            samples, seconds = asyncio.run(run_load(url, bodies, load, model, key, done))
        report = summary(samples, seconds)
        _print(report)
        write_report({"url": url, "concurrency": concurrency, "rate": rate, **report}, json_file)
        if report["errors"]:
            raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    shown = table("what clients felt, ms", "", "mean", "p50", "p90", "p95", "p99", "max")
    for name, title in (
        ("ttft_s", "first token"),
        ("inter_token_s", "between tokens"),
        ("e2e_s", "whole answer"),
    ):
        spread = report[name]
        if spread:
            shown.add_row(title, *(f"{1000 * value:.1f}" for value in spread.values()))
    console.print(shown)
    console.print(
        f"{report['completed']} of {report['requests']} requests in {report['seconds']:.1f} s: "
        f"{report['requests_per_s']:.2f} requests and {report['completion_tokens_per_s']:.1f} "
        f"tokens a second; {report['cached_tokens']} of {report['prompt_tokens']} prompt tokens "
        f"({report['cached_share']:.0%}) were cached"
    )
    for error, count in report["errors"].items():
        console.print(f"[red]{count} failed:[/] {error}")
