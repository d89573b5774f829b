"""Commands on requests that come together."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_mm.apps.bench.terminal import Engine, Model, Out, Report, measuring


@measuring
def streams(
    model: Model = "smollm2",
    number: Annotated[int, typer.Option("--streams", min=1, help="running answers")] = 2,
    tokens: Annotated[int, typer.Option(min=64, help="of the long prompt")] = 6000,
    answer: Annotated[int, typer.Option(min=32, help="tokens of each stream")] = 256,
    chunk: Annotated[
        list[int] | None,
        typer.Option(min=1, help="size of a chunk; may be repeated; default: 32, 64, 128, 256"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each")] = 1,
    json_file: Out = None,
) -> Report:
    """Running answers while a long prompt and a short one come, by the size of a chunk."""
    from kvshare_mm.apps.bench.streams import run

    return run(
        model,
        streams=number,
        tokens=tokens,
        answer=answer,
        chunks=chunk or [32, 64, 128, 256],
        repeats=repeats,
    )


@measuring
def burst(
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=2, help="that come at once")] = 32,
    reports: Annotated[int, typer.Option(min=1, help="lab reports in each prompt")] = 2,
    values: Annotated[int, typer.Option(min=1, help="numbers that differ")] = 8,
    answer: Annotated[int, typer.Option(min=1, help="tokens of each answer")] = 16,
    engine: Engine = "native",
    json_file: Out = None,
) -> Report:
    """Similar requests at once, nothing known before: what is computed, and when they answer."""
    from kvshare_mm.apps.bench.burst import run

    return run(
        model, requests=requests, reports=reports, values=values, answer=answer, engine=engine
    )
