"""`kvshare bench ...`"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvshare_mm.apps.bench.rig import machine
from kvshare_mm.errors import KVShareError

bench = typer.Typer(help="Measure: speed, fidelity, lookup, overhead.", no_args_is_help=True)
console = Console()

Model = Annotated[str, typer.Option(help="hub name, folder, .gguf file, or the embedded smollm2")]


def report_file(path: Path | None) -> Path | None:
    """The path, if a report can be written there; known before anything is measured."""
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    return path


Out = Annotated[
    Path | None,
    typer.Option("--json", help="write the report to this file", callback=report_file),
]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can act on, as one sentence and exit code 1."""
    try:
        yield
    except KVShareError as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2), encoding="utf-8")
        console.print(f"Report written to {out}", markup=False)


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

    with plain_errors():
        chosen, rows = pick(methods), bench_reuse.read_pairs(pairs, limit)
        console.print(f"Loading [bold]{escape(model)}[/] ...")
        rig = Rig(KVShareConfig.of(model=model, embedder=None))
        try:
            report = bench_reuse.run(
                rig, rows, chosen, max_new_tokens=max_new_tokens, repeats=repeats
            )
        finally:
            rig.close()
        table = Table(title=f"{report['pairs']} pairs, {escape(model)}")
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
        console.print_json(data=report)
        _write({"machine": machine(), "model": model, **report}, json_file)


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
    from kvshare_mm.apps.bench.rig import Rig
    from kvshare_mm.config import KVShareConfig

    with plain_errors():
        texts = bench_overhead.read_prompts(prompts)
        rig = Rig(KVShareConfig.of(model=model, embedder=None, host_bytes=16 << 30))
        try:
            report = bench_overhead.run(
                rig, texts, num_donors=donors, num_tokens=tokens, repeats=repeats
            )
        finally:
            rig.close()
        console.print_json(data=report)
        _write(report, json_file)


@bench.command()
def memory(
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=1, help="lab reports served and stored")] = 100,
    host_mib: Annotated[int, typer.Option(min=1, help="budget of donor KV in RAM, MiB")] = 1024,
    json_file: Out = None,
) -> None:
    """What the DELTA tree saves over storing every request whole, and whether budgets hold."""
    from kvshare_mm.apps.bench import memory as bench_memory
    from kvshare_mm.apps.bench.rig import Rig
    from kvshare_mm.config import KVShareConfig

    with plain_errors():
        host_bytes = host_mib << 20
        rig = Rig(
            KVShareConfig.of(model=model, embedder=None, host_bytes=host_bytes, max_model_len=1024)
        )
        try:
            report = bench_memory.run(rig, num_requests=requests, host_bytes=host_bytes)
        finally:
            rig.close()
        console.print_json(data=report)
        _write(report, json_file)


@bench.command()
def template(
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(min=64, help="length of the prompt")] = 400,
    changed: Annotated[int, typer.Option(min=1, help="positions changed, in runs of two")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="measurements")] = 9,
    json_file: Out = None,
) -> None:
    """One template, other numbers: full, KVShare, the ideal, and an identical repeat."""
    from kvshare_mm.apps.bench import template as bench_template
    from kvshare_mm.apps.bench.rig import Rig
    from kvshare_mm.config import KVShareConfig

    with plain_errors():
        rig = Rig(KVShareConfig.of(model=model, embedder=None))
        try:
            report = bench_template.run(
                rig, num_tokens=tokens, num_changed=changed, repeats=repeats
            )
        finally:
            rig.close()
        console.print_json(data=report)
        _write(report, json_file)
