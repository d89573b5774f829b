"""`kvshare bench ...`: cost and speed. `cli_fidelity.py` has what reuse does to answers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kvshare_mm.apps.bench import cli_fidelity, cli_hitrate, cli_kernels, cli_media, cli_serve
from kvshare_mm.apps.bench.terminal import (
    Engine,
    Model,
    Out,
    console,
    opened_rig,
    plain_errors,
    report_file,
    show,
    write_report,
)

bench = typer.Typer(help="Measure: speed, fidelity, lookup, overhead.", no_args_is_help=True)
bench.command()(cli_fidelity.reuse)
bench.command()(cli_fidelity.quality)
bench.command()(cli_fidelity.frontier)
bench.command()(cli_fidelity.calibrate)
bench.command()(cli_hitrate.hitrate)
bench.command()(cli_kernels.kernels)
bench.command()(cli_media.vision)
bench.command()(cli_media.pictures)
bench.command()(cli_serve.serve)
bench.command()(cli_serve.server_overhead)


@bench.command()
def lookup(
    pairs: Annotated[Path, typer.Option("--pairs", help='JSON Lines of {"donor", "target"}')],
    pool: Annotated[Path, typer.Option("--pool", help='JSON Lines of {"text"}: other prompts')],
    model: Model = "smollm2",
    embedder: Annotated[str, typer.Option(help="sentence-transformers model")] = "all-MiniLM-L6-v2",
    limit_pool: Annotated[int, typer.Option(min=1, help="how many other prompts")] = 3000,
    limit: Annotated[int | None, typer.Option(min=1, help="use the first N pairs")] = None,
    json_file: Out = None,
) -> None:
    """Is the right donor found among thousands, and how fast: by words, by meaning, by both."""
    from kvshare_mm.apps.bench.lookup import run_lookup
    from kvshare_mm.apps.bench.rig import machine
    from kvshare_mm.modalities.embed import TextEmbedder
    from kvshare_mm.models.loader import load_tokenizer

    with plain_errors(), tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(model)
        report = run_lookup(
            pairs,
            pool,
            lambda text: list(tokenizer(text)["input_ids"]),
            TextEmbedder(embedder),
            Path(folder),
            limit_pool,
            limit_pairs=limit,
        )
        report = {"kind": "lookup", "machine": machine(), "model": model, **report}
        show(report)
        write_report(report, json_file)


@bench.command()
def overhead(
    prompts: Annotated[
        Path, typer.Option("--prompts", help="prompts to store, one a line or JSONL")
    ],
    model: Model = "smollm2",
    donors: Annotated[int, typer.Option(min=1, help="donors stored")] = 5000,
    tokens: Annotated[int, typer.Option(min=16, help="length of the prompts that miss")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="measurements")] = 15,
    json_file: Out = None,
) -> None:
    """What a miss costs while thousands of donors are stored."""
    from kvshare_mm.apps.bench import overhead as bench_overhead
    from kvshare_mm.apps.bench.prompts import read_prompts

    with plain_errors():
        texts = read_prompts(prompts)
        with opened_rig(model, host_bytes=16 << 30) as rig:
            report = bench_overhead.run(
                rig, texts, num_donors=donors, num_tokens=tokens, repeats=repeats
            )
        show(report)
        write_report(report, json_file)


@bench.command()
def memory(
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=1, help="lab reports served and stored")] = 100,
    host_mib: Annotated[int, typer.Option(min=1, help="budget of donor KV in RAM, MiB")] = 1024,
    json_file: Out = None,
) -> None:
    """What the DELTA tree saves over storing every request whole, and whether budgets hold."""
    from kvshare_mm.apps.bench import memory as bench_memory

    host_bytes = host_mib << 20
    with plain_errors(), opened_rig(model, host_bytes=host_bytes, max_model_len=1024) as rig:
        report = bench_memory.run(rig, num_requests=requests, host_bytes=host_bytes)
        show(report)
        write_report(report, json_file)


@bench.command()
def template(
    model: Model = "smollm2",
    engine: Engine = "native",
    reports: Annotated[int, typer.Option(min=1, help="lab reports in the prompt")] = 1,
    values: Annotated[int, typer.Option(min=1, help="numbers that differ")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="measurements")] = 9,
    json_file: Out = None,
) -> None:
    """One template, other numbers: full, KVShare, the ideal, and an identical repeat."""
    from kvshare_mm.apps.bench import template as bench_template

    with plain_errors():
        if engine == "vllm":
            from kvshare_mm.apps.bench import vllm_engines

            pair = bench_template.pair(reports=reports, values=values)
            cases = vllm_engines.cases_of(model, [pair])
            report = vllm_engines.run(model, cases, repeats=repeats, max_new_tokens=16)
        else:
            with opened_rig(model) as rig:
                report = bench_template.run(rig, reports=reports, values=values, repeats=repeats)
        show(report)
        write_report(report, json_file)


@bench.command()
def report(
    folder: Annotated[Path, typer.Option("--in", help="folder of result files")],
    out: Annotated[
        Path, typer.Option(help="the page", callback=report_file, show_default=True)
    ] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="also write the figures into this folder, as SVG")
    ] = None,
    readme: Annotated[
        list[Path] | None,
        typer.Option(help="also put tables into this Markdown page, where it names results"),
    ] = None,
) -> None:
    """One page of all results in a folder, with figures, that needs no network."""
    from kvshare_mm.apps.bench import report as bench_report
    from kvshare_mm.apps.bench.jsonl import read_text
    from kvshare_mm.apps.bench.readme import filled

    with plain_errors():
        results = bench_report.read_results(folder)
        parts = bench_report.sections(results)
        for page in readme or []:
            text, missing = filled(read_text(page), results)
            page.write_text(text, encoding="utf-8")
            console.print(f"Tables written to {page}", markup=False)
            if missing:
                console.print(f"left as they were, not measured: {', '.join(missing)}")
        out.write_text(bench_report.page(parts), encoding="utf-8")
        console.print(f"Report written to {out}", markup=False)
        for path in bench_report.write_figures(parts, figures) if figures else []:
            console.print(f"Figure written to {path}", markup=False)
