"""Commands that compare reused KV with full recompute: reuse, quality, frontier, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvshare_mm.apps.bench.terminal import (
    Engine,
    Limit,
    Model,
    Out,
    Repair,
    opened_rig,
    plain_errors,
    show,
    write_report,
)
from kvshare_mm.errors import ConfigError

Pairs = Annotated[
    Path, typer.Option("--pairs", help='JSON Lines of {"id", "donor", "target", "reference"}')
]
HeldOut = Annotated[
    bool,
    typer.Option("--held-out", help="only the 40% of the pairs that nothing is fitted to"),
]
_METHODS = "comma-separated; repair=POLICY measures a repair policy"


def _options(repair: str | None) -> dict[str, Any]:
    return {"repair": repair} if repair else {}


def reuse(
    pairs: Pairs,
    model: Model = "smollm2",
    engine: Engine = "native",
    methods: Annotated[
        str, typer.Option(help=_METHODS + "; not with --engine vllm")
    ] = "full,prefix,placeholders,cacheblend,epic,kvshare",
    repair: Repair = None,
    held_out: HeldOut = False,
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens compared")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="timings a method")] = 3,
    layers: Annotated[
        bool, typer.Option("--layers", help="also compare reused KV layer by layer")
    ] = False,
    json_file: Out = None,
) -> None:
    """Methods side by side on pairs of similar prompts: first-token time, tokens computed,
    divergence from full recompute. A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench import reuse as bench_reuse
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.methods import pick
    from kvshare_mm.apps.bench.prompts import read_pairs

    with plain_errors():
        chosen = bench_reuse.with_full(pick(methods))
        rows = read_pairs(pairs, limit, held_out=held_out)
        if engine == "vllm":
            from kvshare_mm.apps.bench import vllm_engines

            report = vllm_engines.run(
                model,
                vllm_engines.cases_of(model, rows),
                repeats=repeats,
                max_new_tokens=max_new_tokens,
                repair=repair,
            )
            show(report)
            write_report(report, json_file)
            return
        with opened_rig(model, len(chosen), **_options(repair)) as rig:
            settings = [*rig.settings, "reuse", chosen, max_new_tokens, repeats, layers]
            journal = Journal.beside(json_file, settings)
            report = bench_reuse.run(
                rig,
                rows,
                chosen,
                max_new_tokens=max_new_tokens,
                repeats=repeats,
                layers=layers,
                journal=journal,
            )
        show(report)
        write_report(report, json_file)
        journal.complete()


def quality(
    task: Annotated[
        str, typer.Option(help="translation, summaries, multidoc, reports, exams, or letters")
    ],
    data: Annotated[
        Path | None, typer.Option(help="the task's data file; reports, exams and letters need none")
    ] = None,
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option(help=_METHODS + "; gptcache reuses answers")
    ] = "full,prefix,placeholders,cacheblend,epic,deviation,kvshare",
    repair: Repair = None,
    limit: Annotated[int, typer.Option(min=1, help="use the first N items")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="of prompts and of the bootstrap")] = 0,
    json_file: Out = None,
) -> None:
    """Scores of answers by every method with 95% intervals, and the leak test of changed facts. A
    killed run goes on where it stopped."""
    from kvshare_mm.apps.bench import quality as bench_quality
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.methods import pick_any
    from kvshare_mm.apps.bench.tasks import task_named

    with plain_errors():
        asked, chosen = task_named(task), pick_any(methods)
        items = asked.items(data, limit, seed)
        slots = bench_quality.slots_needed(chosen)
        with opened_rig(model, slots, **_options(repair)) as rig:
            settings = [*rig.settings, "quality", asked, chosen]
            journal = Journal.beside(json_file, settings)
            report = bench_quality.run(rig, asked, items, chosen, journal, seed=seed)
        report["data"] = data.name if data else None
        show(report)
        write_report(report, json_file)
        journal.complete()


def frontier(
    pairs: Pairs,
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option(help=_METHODS + "; each is run at several budgets")
    ] = "prefix,placeholders,cacheblend,epic,deviation,kvshare",
    repair: Repair = None,
    held_out: HeldOut = False,
    limit: Limit = None,
    json_file: Out = None,
) -> None:
    """Divergence from full recompute against the share computed, every method at several budgets.
    A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench import frontier as bench_frontier
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.methods import pick
    from kvshare_mm.apps.bench.prompts import read_pairs

    with plain_errors():
        chosen, rows = pick(methods), read_pairs(pairs, limit, held_out=held_out)
        with opened_rig(model, **_options(repair)) as rig:
            journal = Journal.beside(json_file, [*rig.settings, "frontier", chosen])
            report = bench_frontier.run(rig, rows, chosen, journal=journal)
        show(report)
        write_report(report, json_file)
        journal.complete()


def calibrate(
    pairs: Pairs,
    model: Model = "smollm2",
    targets: Annotated[
        str, typer.Option(help="divergences (KL, nats) to aim at")
    ] = "0.003,0.01,0.03",
    limit: Limit = None,
    json_file: Out = None,
) -> None:
    """Is the predicted divergence kept? Fits the bound to 60% of the pairs, checks it on the rest.
    A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench import calibrate as bench_calibrate
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.prompts import read_pairs

    with plain_errors():
        rows = read_pairs(pairs, limit)
        aims = [_positive(t) for t in targets.split(",")]
        with opened_rig(model) as rig:
            journal = Journal.beside(json_file, [*rig.settings, "calibrate", aims])
            report = bench_calibrate.run(rig, rows, aims, journal=journal)
        show(report)
        write_report(report, json_file)
        journal.complete()


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"targets: {text!r} is not a number above 0")
    return value
