"""`kvshare bench ...`: cost and speed. `cli_fidelity.py` has what reuse does to answers."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from kvshare_mm.apps.bench.cli_fidelity import (
    audits,
    calibrate,
    coverage,
    frontier,
    hitrate,
    pictures,
    quality,
    reuse,
)
from kvshare_mm.apps.bench.cli_load import burst, streams
from kvshare_mm.apps.bench.cli_workloads import derived, workloads
from kvshare_mm.apps.bench.terminal import (
    Embedder,
    Engine,
    HeldOut,
    Limit,
    Model,
    Out,
    Pairs,
    Repeats,
    Report,
    measuring,
    opened_rig,
)
from kvshare_mm.apps.terminal import console, plain_errors, report_file

bench = typer.Typer(help="Measure: speed, fidelity, lookup, overhead.", no_args_is_help=True)
for command in (
    *(workloads, derived, reuse, quality, frontier),
    *(calibrate, coverage, audits, hitrate, pictures, streams, burst),
):
    bench.command()(command)

Url = Annotated[
    str | None, typer.Option(help="a server of the same model; default: one is started")
]
Key = Annotated[str | None, typer.Option(envvar="KVSHARE_API_KEY", help="API key of the server")]


@bench.command()
@measuring
def lookup(
    pairs: Annotated[Path, typer.Option("--pairs", help='JSON Lines of {"donor", "target"}')],
    pool: Annotated[Path, typer.Option("--pool", help='JSON Lines of {"text"}: other prompts')],
    model: Model = "smollm2",
    embedder: Embedder = "all-MiniLM-L6-v2",
    limit_pool: Annotated[int, typer.Option(min=1, help="how many other prompts")] = 3000,
    limit: Limit = None,
    json_file: Out = None,
) -> Report:
    """Is the right donor found among thousands, and how fast: by words, by meaning, by both."""
    from kvshare_mm.apps.bench.lookup import run
    from kvshare_mm.modalities.embed import TextEmbedder
    from kvshare_mm.models.loader import load_tokenizer

    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            pairs,
            pool,
            lambda text: list(tokenizer(text)["input_ids"]),
            TextEmbedder(embedder),
            Path(folder),
            limit_pool,
            limit_pairs=limit,
        )
    return {"model": model, **report}


@bench.command()
@measuring
def overhead(
    prompts: Annotated[
        Path, typer.Option("--prompts", help="prompts to store, one a line or JSONL")
    ],
    model: Model = "smollm2",
    donors: Annotated[int, typer.Option(min=1, help="donors stored")] = 5000,
    tokens: Annotated[int, typer.Option(min=16, help="length of the prompts that miss")] = 400,
    repeats: Repeats = 15,
    json_file: Out = None,
) -> Report:
    """What a miss costs while thousands of donors are stored."""
    from kvshare_mm.apps.bench.overhead import run
    from kvshare_mm.apps.bench.prompts import read_prompts

    texts = read_prompts(prompts)
    with opened_rig(model, host_bytes=16 << 30) as rig:
        return run(rig, texts, num_donors=donors, num_tokens=tokens, repeats=repeats)


@bench.command()
@measuring
def drafts(
    pairs: Pairs,
    model: Model = "smollm2",
    limit: Limit = None,
    held_out: HeldOut = False,
    max_new_tokens: Annotated[int, typer.Option(min=3, help="longest answer")] = 48,
    json_file: Out = None,
) -> Report:
    """Time per token with drafts and without, and whether the answers are the same."""
    from kvshare_mm.apps.bench.drafts import run
    from kvshare_mm.apps.bench.prompts import read_pairs

    return run(model, read_pairs(pairs, limit, held_out=held_out), max_new_tokens)


@bench.command()
@measuring
def memory(
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=1, help="lab reports served and stored")] = 100,
    host_mib: Annotated[int, typer.Option(min=1, help="budget of donor KV in RAM, MiB")] = 1024,
    json_file: Out = None,
) -> Report:
    """What the DELTA tree saves over storing every request whole, and whether budgets hold."""
    from kvshare_mm.apps.bench.memory import run

    with opened_rig(model, host_bytes=host_mib << 20, max_model_len=1024) as rig:
        return run(rig, num_requests=requests)


@bench.command()
@measuring
def template(
    model: Model = "smollm2",
    engine: Engine = "native",
    reports: Annotated[int, typer.Option(min=1, help="lab reports in the prompt")] = 1,
    values: Annotated[int, typer.Option(min=1, help="numbers that differ")] = 8,
    repeats: Repeats = 9,
    json_file: Out = None,
) -> Report:
    """One template, other numbers: full, KVShare, the ideal, and an identical repeat."""
    from kvshare_mm.apps.bench.template import pair, run

    if engine == "vllm":
        from kvshare_mm.apps.bench import vllm_engines

        cases = vllm_engines.cases_of(model, [pair(reports=reports, values=values)])
        return vllm_engines.run(model, cases, repeats=repeats, max_new_tokens=16)
    with opened_rig(model) as rig:
        return run(rig, reports=reports, values=values, repeats=repeats)


@bench.command()
@measuring
def vision(
    divide: Annotated[
        int, typer.Option(min=1, help="divide the 3B model's widths and depths by this")
    ] = 4,
    width: Annotated[int, typer.Option(min=56, help="of the picture")] = 640,
    height: Annotated[int, typer.Option(min=56, help="of the picture")] = 480,
    repeats: Repeats = 5,
    repair: Annotated[str, typer.Option(help="repair policy of the method kvshare")] = "auto",
    json_file: Out = None,
) -> Report:
    """First-token time for a known picture and another question; tower and text apart.

    The model has random weights in the proportions of Qwen2.5-VL-3B.
    """
    from kvshare_mm.apps.bench.vision import run

    return run(divide=divide, width=width, height=height, repeats=repeats, repair=repair)


@bench.command()
@measuring
def kernels(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda; auto is the GPU if any")] = "auto",
    repeats: Repeats = 20,
    json_file: Out = None,
) -> Report:
    """Attention and KV edit for one layer, by every backend that runs here, and checked."""
    import torch

    from kvshare_mm.apps.bench.kernels import SHAPES, run
    from kvshare_mm.errors import ConfigError

    found = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not found):
        raise ConfigError(f"device {device!r} is not there: auto, cpu, or cuda with a GPU")
    where = "cuda" if found and device != "cpu" else "cpu"
    return run(torch.device(where), repeats=repeats, shapes=SHAPES[where])


@bench.command()
@measuring
def serve(
    requests: Annotated[
        Path, typer.Option("--requests", help='JSON Lines of {"text"} or of chat bodies')
    ],
    url: Annotated[str, typer.Option(help="a running server")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="default: the server's first")] = None,
    key: Key = None,
    concurrency: Annotated[int, typer.Option(min=1, help="clients at the same time")] = 8,
    limit: Limit = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 64,
    json_file: Out = None,
) -> Report:
    """What a running server reuses under load, why it declines, and what its first tokens wait for.

    Throughput, rates and times between tokens: vllm bench serve or guidellm, see the README.
    """
    from kvshare_mm.apps.bench.serve import load, read_requests

    bodies = [{"max_tokens": max_tokens, **body} for body in read_requests(requests, limit)]
    return asyncio.run(load(url, bodies, concurrency, model, key))


@bench.command()
@measuring
def server_overhead(
    model: Model = "smollm2",
    url: Url = None,
    key: Key = None,
    repeats: Repeats = 15,
    words: Annotated[int, typer.Option(min=4, help="in each prompt")] = 16,
    json_file: Out = None,
) -> Report:
    """What the server adds to the first token over the Python API, one request at a time."""
    from kvshare_mm.apps.bench.server_overhead import run, started
    from kvshare_mm.llm import KVShare
    from kvshare_mm.models.loader import locate, measured_dtype

    with ExitStack() as opened:
        dtype = measured_dtype(locate(model))  # once: both must compute in the same
        if url is None:
            console.print("Starting a server ...")
            url = opened.enter_context(started(model, dtype))
        options: dict[str, Any] = {"dtype": dtype, "embedder": None, "audit_share": 0}
        llm = opened.enter_context(KVShare(model, **options))
        return run(llm, url, key=key, repeats=repeats, words=words)


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
