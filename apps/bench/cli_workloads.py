"""Commands on long prompts: where prefix caching ends, and facts that follow from an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvshare_mm.apps.bench.terminal import (
    Engine,
    Model,
    Out,
    Repair,
    Report,
    Seed,
    measuring,
    opened_rig,
)

Data = Annotated[
    Path | None,
    typer.Option(
        help="folder with agents_airline.jsonl, agents_airline_tools.json, agents_swe.jsonl and "
        "rag_musique.jsonl; default: small samples of them"
    ),
]
Tokens = Annotated[int, typer.Option(min=500, help="of each prompt of a workload, about")]

_METHODS = "comma-separated; repair=POLICY measures a repair policy"


@measuring
def workloads(
    data: Data = None,
    model: Model = "smollm2",
    tokens: Tokens = 1000,
    number: Annotated[int, typer.Option("--pairs", min=1, help="pairs of each kind")] = 3,
    kind: Annotated[
        list[str] | None, typer.Option(help="measure this kind, and no other; may be repeated")
    ] = None,
    engine: Engine = "native",
    methods: Annotated[
        str, typer.Option(help=f"{_METHODS}; not with --engine vllm")
    ] = "prefix,kvshare",
    repair: Repair = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="measurements of each; only with --engine vllm")
    ] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens compared")] = 32,
    json_file: Out = None,
) -> Report:
    """Does it fit my traffic? Long prompts with small edits: a clock at the top, turns dropped,
    documents in another order and more; prefix caching and KVShare side by side, or inside vLLM."""
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.material import Material
    from kvshare_mm.apps.bench.methods import pick
    from kvshare_mm.apps.bench.workloads import KINDS, measured_methods, pairs_of, run

    kinds = tuple(kind or KINDS)
    if engine == "vllm":
        from kvshare_mm.apps.bench import vllm_engines as inside
        from kvshare_mm.models.loader import load_tokenizer

        tokenizer = load_tokenizer(model)

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        pairs = pairs_of(Material(data, count, tokens), number, kinds)
        cases = inside.cases_of(model, pairs)
        return inside.run(
            model, cases, repeats=repeats, max_new_tokens=max_new_tokens, repair=repair
        )
    chosen = pick(methods)
    with opened_rig(model, len(measured_methods(chosen)), repair=repair) as rig:
        settings = [*rig.settings, "workloads", chosen, tokens, kinds, max_new_tokens]
        return run(
            rig,
            Material(data, rig.count, tokens),
            chosen,
            number=number,
            kinds=kinds,
            max_new_tokens=max_new_tokens,
            journal=Journal.beside(json_file, settings),
        )


@measuring
def derived(
    data: Data = None,
    model: Model = "smollm2",
    per_fact: Annotated[int, typer.Option(min=1, help="edits of each fact")] = 8,
    methods: Annotated[str, typer.Option(help=_METHODS)] = "epic,kvshare",
    repair: Repair = None,
    seed: Seed = 0,
    json_file: Out = None,
) -> Report:
    """Facts that follow from an edited value and stand right behind it, 250 and 1,500 tokens later:
    are they answered anew? A killed run goes on where it stopped."""
    from kvshare_mm.apps.bench.derived import DISTANCES, derived_cases, run
    from kvshare_mm.apps.bench.journal import Journal
    from kvshare_mm.apps.bench.material import Material
    from kvshare_mm.apps.bench.methods import pick

    chosen = pick(methods)
    with opened_rig(model, repair=repair) as rig:
        cases = derived_cases(Material(data, rig.count, max(DISTANCES)), per_fact, seed)
        journal = Journal.beside(json_file, [*rig.settings, "derived", chosen])
        return run(rig, cases, chosen, journal=journal)
