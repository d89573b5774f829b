"""`kvshare bench serve` and `kvshare bench server-overhead`."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from kvshare_mm.apps.bench.terminal import (
    Model,
    Out,
    console,
    plain_errors,
    show,
    write_report,
)


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
    from kvshare_mm.apps.bench.serve import (
        Load,
        Sample,
        first_model,
        read_requests,
        run_load,
        summary,
    )

    with plain_errors():
        bodies = read_requests(requests, limit) * repeat
        load = Load(concurrency, rate, max_tokens, ignore_eos, seed=seed)
        model = model or asyncio.run(first_model(url, key))
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("requests", total=len(bodies))

            def done(_: Sample) -> None:
                progress.advance(task)

            samples, seconds = asyncio.run(run_load(url, bodies, load, model, key, done))
        found = summary(samples, seconds)
        report = {
            "kind": "serve",
            "model": model,
            "url": url,
            "concurrency": concurrency,
            "rate": rate,
            **found,
        }
        show(report)
        for error, count in report["errors"].items():
            console.print(f"[red]{count} failed:[/] {error}")
        write_report(report, json_file)
        if report["errors"]:
            raise typer.Exit(1)


def server_overhead(
    model: Model = "smollm2",
    url: Annotated[
        str | None, typer.Option(help="a server of the same model; default: one is started")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="KVSHARE_API_KEY", help="API key of that server")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="prompts, asked of both in turns")] = 15,
    words: Annotated[int, typer.Option(min=4, help="in each prompt")] = 16,
    json_file: Out = None,
) -> None:
    """What the server adds to the first token over the Python API, one request at a time."""
    from kvshare_mm.apps.bench import server_overhead as bench_overhead
    from kvshare_mm.llm import KVShare
    from kvshare_mm.models.loader import locate, measured_dtype

    with plain_errors(), ExitStack() as opened:
        dtype = measured_dtype(locate(model))  # once: both must compute in the same
        process = None
        if url is None:
            console.print("Starting a server ...")
            url, process = opened.enter_context(bench_overhead.started(model, dtype))
        llm = opened.enter_context(KVShare(model, dtype=dtype, embedder=None))
        report = bench_overhead.run(
            llm, url, process=process, key=key, repeats=repeats, words=words
        )
        show(report)
        write_report(report, json_file)
