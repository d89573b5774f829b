"""The command `kvshare bench hitrate`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from kvshare_mm.apps.bench.terminal import (
    Limit,
    Model,
    Out,
    console,
    opened_rig,
    plain_errors,
    table,
    write_report,
)

if TYPE_CHECKING:
    from kvshare_mm.stream import SegmentStream


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
        str, typer.Option(help="with --plan-only, repairs that count: none, window:K, tail:K")
    ] = "none",
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
    seed: Annotated[int, typer.Option(min=0, help="of the order")] = 0,
    json_file: Out = None,
) -> None:
    """The share of a stream's tokens that need no recomputation: prefix caching and KVShare against
    the pool's size, GPTCache's hit rate, and the planner's time."""
    from kvshare_mm.apps.bench import hitrate as bench_hitrate
    from kvshare_mm.apps.bench.datasets import read_stream
    from kvshare_mm.apps.bench.rig import machine
    from kvshare_mm.errors import ConfigError
    from kvshare_mm.models.loader import load_tokenizer

    with plain_errors():
        sizes = _sizes(pool_sizes)
        if similar_only and embedder == "none":
            raise ConfigError("--similar-only needs an embedder")
        texts = read_stream(stream, limit)
        if shuffle:
            random.Random(seed).shuffle(texts)
        embeddings = None
        if embedder != "none":
            texts, embeddings = _embedded(texts, embedder, similar_only)
        tokens = _tokens(load_tokenizer(model), raw)
        streams = [tokens(text) for text in texts]
        head, tail = (0, 0) if raw else bench_hitrate.template_length(tokens("Why?"), tokens("5"))
        spans = [bench_hitrate.user_span(s, head, tail) for s in streams]
        num_measured = measure or max(1, len(streams) // 4)

        def measured(pools: dict[str, Any]) -> dict[str, Any]:
            return bench_hitrate.run(streams, spans, pools, sizes, num_measured, embeddings)

        if plan_only:
            report = measured(_planned(repair))
        else:
            with opened_rig(model, host_bytes=16 << 30) as rig:
                report = measured(_served(rig))
        report |= {
            "machine": machine(),
            "model": model,
            "stream": Path(stream).stem,
            "similar_only": similar_only,
            "embedder": embedder,
            "plan_only": plan_only,
            "repair": repair if plan_only else "default",
        }
        _show(report)
        write_report(report, json_file)


def _sizes(text: str) -> list[int]:
    from kvshare_mm.errors import ConfigError

    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"pool sizes are numbers, not {text!r}") from error
    if min(sizes) < 1:
        raise ConfigError("a pool holds at least 1 donor")
    return sorted(set(sizes))


def _embedded(
    texts: list[str], embedder: str, similar_only: bool
) -> tuple[list[str], NDArray[np.float32]]:
    from rich.progress import track

    from kvshare_mm.apps.bench.similar import have_partner
    from kvshare_mm.errors import ConfigError
    from kvshare_mm.modalities.embed import TextEmbedder

    if similar_only:
        texts = list(dict.fromkeys(texts))
    model = TextEmbedder(embedder)
    batches = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    parts = [model.embed(batch) for batch in track(batches, "Embedding", transient=True)]
    embeddings = np.concatenate(parts)
    if similar_only:
        mask = have_partner(embeddings)
        console.print(f"{mask.sum()} of {len(texts)} different prompts have a partner")
        if mask.sum() < 2:
            raise ConfigError("no prompts are left: none has a near-identical partner")
        texts = [text for text, kept in zip(texts, mask, strict=True) if kept]
        embeddings = embeddings[mask]
    return texts, embeddings


def _tokens(tokenizer: Any, raw: bool) -> Callable[[str], SegmentStream]:
    from kvshare_mm.chat import chat_stream, prompt_stream

    if raw or not tokenizer.chat_template:
        return lambda text: prompt_stream(text, tokenizer)[0]
    return lambda text: chat_stream([{"role": "user", "content": text}], tokenizer)[0]


def _planned(repair: str) -> dict[str, Any]:
    from kvshare_mm.apps.bench.pools import PlannedPool
    from kvshare_mm.config import KVShareConfig
    from kvshare_mm.repair import make_policy

    config = KVShareConfig.of(repair=repair)
    policy = make_policy(repair)
    return {
        "prefix": lambda size: PlannedPool(
            size, config.planner.but_exact_only(), policy, whole=True
        ),
        "kvshare": lambda size: PlannedPool(size, config.planner, policy),
    }


def _served(rig: Any) -> dict[str, Any]:
    from kvshare_mm.apps.bench.methods import METHODS
    from kvshare_mm.apps.bench.pools import ServedPool

    return {
        name: lambda size, name=name: ServedPool(rig, size, METHODS[name], name)
        for name in ("prefix", "kvshare")
    }


def _show(report: dict[str, Any]) -> None:
    shown = table(
        f"{report['stream']}: the last {report['measured']} of {report['prompts']} prompts",
        "pool", "prefix caching", "KVShare", "GPTCache hits", "planner p50 / p99",
    )  # fmt: skip
    for size, found in report["pool_sizes"].items():
        methods, hits = found["methods"], found["gptcache_hit_rate"]
        ms = methods["kvshare"]["planner_ms"]
        shown.add_row(
            size,
            f"{methods['prefix']['token_share']:.1%}",
            f"{methods['kvshare']['token_share']:.1%}",
            "-" if hits is None else f"{hits:.1%}",
            f"{ms['p50']:.1f} / {ms['p99']:.1f} ms",
        )
    console.print(shown)
