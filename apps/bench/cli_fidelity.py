"""Commands that compare what is reused with full recompute, and how much there is to reuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from kvshare_mm.apps.bench.cli_workloads import Data, Tokens
from kvshare_mm.apps.bench.terminal import (
    Engine,
    HeldOut,
    Limit,
    Model,
    Out,
    Pairs,
    Repair,
    Repeats,
    Report,
    Seed,
    measuring,
    opened_rig,
)
from kvshare_mm.apps.terminal import console

T = TypeVar("T", int, float)

_METHODS = "comma-separated; repair=POLICY measures a repair policy"


@measuring
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
    repeats: Repeats = 3,
    layers: Annotated[
        bool, typer.Option("--layers", help="also compare reused KV layer by layer")
    ] = False,
    json_file: Out = None,
) -> Report:
    """Methods side by side on pairs of similar prompts: first-token time, tokens computed,
    divergence from full recompute. A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.methods import pick, with_full
    from kvshare_mm.apps.bench.prompts import read_pairs
    from kvshare_mm.apps.bench.reuse import run

    chosen = with_full(pick(methods))
    rows = read_pairs(pairs, limit, held_out=held_out)
    if engine == "vllm":
        from kvshare_mm.apps.bench import vllm_engines as inside

        cases = inside.cases_of(model, rows)
        return inside.run(
            model, cases, repeats=repeats, max_new_tokens=max_new_tokens, repair=repair
        )
    with opened_rig(model, len(chosen), repair=repair) as rig:
        settings = [*rig.settings, "reuse", chosen, max_new_tokens, repeats, layers]
        return run(
            rig,
            rows,
            chosen,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            layers=layers,
            journal=Journal.beside(json_file, settings),
        )


@measuring
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
    seed: Seed = 0,
    json_file: Out = None,
) -> Report:
    """Scores of answers by every method with 95% intervals, and the leak test of changed facts. A
    killed run goes on where it stopped."""
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.methods import pick_any
    from kvshare_mm.apps.bench.quality import run, slots_needed
    from kvshare_mm.apps.bench.tasks import task_named

    asked, chosen = task_named(task), pick_any(methods)
    items = asked.items(data, limit, seed)
    with opened_rig(model, slots_needed(chosen), repair=repair) as rig:
        journal = Journal.beside(json_file, [*rig.settings, "quality", asked, chosen])
        report = run(rig, asked, items, chosen, journal, seed=seed)
    return {**report, "data": data.name if data else None}


@measuring
def frontier(
    pairs: Annotated[
        Path | None, typer.Option(help='JSON Lines of {"id", "donor", "target"}; or --workloads')
    ] = None,
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option(help=_METHODS + "; each is run at several budgets")
    ] = "prefix,placeholders,cacheblend,epic,deviation,kvshare",
    repair: Repair = None,
    held_out: HeldOut = False,
    limit: Limit = None,
    workloads: Annotated[
        int | None, typer.Option(min=1, help="so many pairs of each kind of `bench workloads`")
    ] = None,
    data: Data = None,
    tokens: Tokens = 1000,
    json_file: Out = None,
) -> Report:
    """Divergence from full recompute against the share computed, every method at several budgets.
    A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench.frontier import run
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.material import Material
    from kvshare_mm.apps.bench.methods import pick
    from kvshare_mm.apps.bench.prompts import read_pairs
    from kvshare_mm.apps.bench.workloads import pairs_of
    from kvshare_mm.errors import ConfigError

    if (pairs is None) == (workloads is None):
        raise ConfigError("the prompts are those of --pairs or of --workloads: give one of the two")
    chosen = pick(methods)
    rows = read_pairs(pairs, limit, held_out=held_out) if pairs else []
    what = "similar prompts" if pairs else f"prompts of {tokens} tokens with small edits"
    with opened_rig(model, repair=repair) as rig:
        if workloads:
            rows = pairs_of(Material(data, rig.count, tokens), workloads)
        journal = Journal.beside(json_file, [*rig.settings, "frontier", chosen])
        return run(rig, rows, chosen, what=what, journal=journal)


@measuring
def calibrate(
    pairs: Pairs,
    model: Model = "smollm2",
    targets: Annotated[
        str, typer.Option(help="divergences (KL, nats) to aim at")
    ] = "0.003,0.01,0.03",
    limit: Limit = None,
    json_file: Out = None,
) -> Report:
    """Is the predicted divergence kept? Fits the bound to 60% of the pairs, checks it on the rest.
    A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench.calibrate import run
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.prompts import read_pairs

    rows = read_pairs(pairs, limit)
    aims = _numbers("targets", targets, float)
    with opened_rig(model) as rig:
        journal = Journal.beside(json_file, [*rig.settings, "calibrate", aims])
        return run(rig, rows, aims, journal=journal)


@measuring
def coverage(
    data: Annotated[
        Path | None,
        typer.Option(help="folder with pairs.jsonl and banking77.jsonl; default: made-up requests"),
    ] = None,
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=3, help="of the stream")] = 400,
    audit_shares: Annotated[
        str, typer.Option(help="shares of the similar requests that are audited, one stream each")
    ] = "0.02,1",
    max_divergence: Annotated[
        float | None, typer.Option(min=0, help="that is asked for (KL, nats); default: 0.01")
    ] = None,
    seed: Seed = 0,
    json_file: Out = None,
) -> Report:
    """Is the promised bound kept, from a cold start and as traffic shifts? With a model that sees,
    the requests are about pictures. A killed run goes on with the share that it was at."""
    from kvshare_mm.apps.bench.coverage import run
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.shifts import picture_stream, text_stream
    from kvshare_mm.errors import ConfigError

    shares = _numbers("audit shares", audit_shares, float)
    if max(shares) > 1:
        raise ConfigError("audit shares: 1 is all requests")
    with opened_rig(model, 2, max_divergence=max_divergence) as rig:
        if rig.encoder is not None:
            stream = picture_stream(requests, seed)
        else:
            stream = text_stream(requests, data, rig.count, seed)
        settings = [*rig.settings, "coverage", [str(one) for one in stream], shares]
        return run(rig, stream, shares, journal=Journal.beside(json_file, settings))


@measuring
def audits(
    data: Annotated[
        Path | None,
        typer.Option(help="folder with pairs.jsonl and banking77.jsonl; default: made-up requests"),
    ] = None,
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=3, help="of the stream")] = 120,
    audit_shares: Annotated[
        str, typer.Option(help="shares of the similar requests that are audited")
    ] = "0.02,1",
    pause_s: Annotated[float, typer.Option(min=0, help="seconds behind each request")] = 0.2,
    seed: Seed = 0,
    json_file: Out = None,
) -> Report:
    """What audits cost those who wait for a first token: engines with and without, in turns."""
    from kvshare_mm.apps.bench.audits import run
    from kvshare_mm.apps.bench.shifts import text_stream
    from kvshare_mm.models.loader import load_tokenizer

    shares = _numbers("audit shares", audit_shares, float)
    tokenizer = load_tokenizer(model)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return run(model, text_stream(requests, data, count, seed), shares, pause_s=pause_s)


@measuring
def hitrate(
    stream: Annotated[
        str,
        typer.Option(help="wildchat, sharegpt, lmsys, or a .jsonl, .json or .parquet file"),
    ],
    model: Model = "smollm2",
    pool_sizes: Annotated[str, typer.Option(help="donors kept, comma-separated")] = "250,1000,4000",
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="tokenizer and planner only: no model is loaded")
    ] = False,
    repair: Annotated[
        str,
        typer.Option(help="with --plan-only, repairs that count: auto:KL, none, window:K, tail:K"),
    ] = "auto",
    limit: Limit = None,
    measure: Annotated[
        int | None, typer.Option(min=1, help="measure the last N prompts; default: a quarter")
    ] = None,
    shuffle: Annotated[
        bool, typer.Option(help="in random order; datasets are often sorted by subject")
    ] = True,
    similar_only: Annotated[
        bool, typer.Option("--similar-only", help="only prompts with a near-identical partner")
    ] = False,
    embedder: Annotated[
        str,
        typer.Option(
            help="for GPTCache and --similar-only, e.g. all-MiniLM-L6-v2 or "
            "Alibaba-NLP/gte-multilingual-base; none leaves GPTCache out"
        ),
    ] = "all-MiniLM-L6-v2",
    raw: Annotated[
        bool, typer.Option("--raw", help="prompts as they are, without chat template")
    ] = False,
    seed: Seed = 0,
    json_file: Out = None,
) -> Report:
    """The share of a stream's tokens that need no recomputation: prefix caching and KVShare against
    the pool's size, GPTCache's hit rate, and the planner's time."""
    from kvshare_mm.apps.bench.datasets import read_stream
    from kvshare_mm.apps.bench.hitrate import encoded, run
    from kvshare_mm.apps.bench.pools import planned, served
    from kvshare_mm.apps.bench.similar import embedded
    from kvshare_mm.errors import ConfigError

    sizes = sorted(set(_numbers("pool sizes", pool_sizes, int)))
    if similar_only and embedder == "none":
        raise ConfigError("--similar-only needs an embedder")
    texts = read_stream(stream, limit)
    if shuffle:
        random.Random(seed).shuffle(texts)
    embeddings = None
    if embedder != "none":
        different = len(set(texts))
        texts, embeddings = embedded(texts, embedder, similar_only)
        if similar_only:
            console.print(f"{len(texts)} of {different} different prompts have a partner")
    streams, spans = encoded(texts, model, raw)
    last = measure or max(1, len(streams) // 4)
    if plan_only:
        report = run(streams, spans, planned(repair), sizes, last, embeddings)
    else:
        with opened_rig(model, host_bytes=16 << 30) as rig:
            report = run(streams, spans, served(rig), sizes, last, embeddings)
    return {
        **report,
        "model": model,
        "stream": Path(stream).stem,
        "similar_only": similar_only,
        "embedder": embedder,
        "plan_only": plan_only,
        "repair": repair if plan_only else "default",
    }


@measuring
def pictures(
    model: Model = "tiny-vl",
    pairs: Annotated[int, typer.Option(min=1, help="pairs of similar requests")] = 640,
    leak_pairs: Annotated[
        int, typer.Option(min=0, help="pairs that differ in the picture alone")
    ] = 300,
    traffic_pairs: Annotated[
        int, typer.Option(min=0, help="pairs with a picture that is known")
    ] = 320,
    photos: Annotated[int, typer.Option(min=1, max=2, help="pictures of a request")] = 1,
    repair: Annotated[str, typer.Option(help="repair policy of the method kvshare")] = "auto",
    seed: Annotated[int, typer.Option(help="of the requests, all held out of training")] = 1,
    json_file: Out = None,
) -> Report:
    """Right answers about pictures under reuse, and whether any is about the stored picture."""
    from kvshare_mm.apps.bench.methods import METHODS
    from kvshare_mm.apps.bench.pictures import run

    methods = [METHODS[name] for name in ("prefix", "kvshare")]
    with opened_rig(model, 3, max_model_len=2048, repair=repair) as rig:
        return run(
            rig,
            methods,
            num_pairs=pairs,
            num_leak_pairs=leak_pairs,
            num_traffic_pairs=traffic_pairs,
            num_photos=photos,
            seed=seed,
        )


def _numbers(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    from kvshare_mm.errors import ConfigError

    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}: {text!r} is no list of numbers") from error
    if not all(0 < number < float("inf") for number in numbers):
        raise ConfigError(f"{name}: {text!r} has one that is not above 0")
    return numbers
