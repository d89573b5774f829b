"""`kvshare bench reuse`: methods side by side on pairs of similar prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvshare_mm.apps.bench.divergence import (
    KVDeviation,
    against,
    agreement,
    kv_deviation,
    mean_deviation,
    spread,
)
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import Asked, measured_pairs
from kvshare_mm.apps.bench.methods import FULL, Method, with_full
from kvshare_mm.apps.bench.rig import Rig, Served


def run(
    rig: Rig,
    pairs: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
    layers: bool = False,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Measure every method on every pair.

    For each pair the donor is prefilled and stored; then the target is served by all methods in
    turn, `repeats` times over, so that a noisy machine is noisy for all of them. "full" is always
    measured: the others are compared with it.

    Args:
        rig: with a slot for each method, full recompute included.
        layers: also compare the KV of reused positions with full recompute, layer by layer.
        journal: results that are known already, and where new ones are kept.

    Returns:
        The report as JSON-ready data; see the README for its fields.

    Raises:
        ConfigError: no pair could be served.
    """
    methods = with_full(methods)
    if rig.num_slots < len(methods):
        raise ValueError(f"{len(methods)} slots are needed, the rig has {rig.num_slots}")
    per_pair, skipped = measured_pairs(
        rig,
        pairs,
        lambda asked: measure(rig, asked, methods, max_new_tokens, repeats, layers),
        journal,
        answer=max_new_tokens,
    )
    return {
        "kind": "reuse",
        "model": rig.loaded.name,
        "dtype": str(rig.loaded.dtype).removeprefix("torch."),
        "pairs": len(per_pair),
        "skipped": skipped,
        "repeats": repeats,
        "max_new_tokens": max_new_tokens,
        "methods": {m.name: summary(m.name, per_pair) for m in methods},
        "per_pair": per_pair,
    }


def measure(
    rig: Rig,
    asked: Asked,
    methods: Sequence[Method],
    max_new_tokens: int,
    repeats: int,
    layers: bool,
) -> dict[str, Any]:
    times: dict[str, list[float]] = {m.name: [] for m in methods}
    served: dict[str, Served] = {}
    for _ in range(repeats):
        for slot, method in enumerate(methods):
            one = rig.serve(asked.target, asked.ns, method, slot)
            times[method.name].append(one.ttft)
            served[method.name] = one
    full = served[FULL.name]
    # Before answers are written behind the prompts.
    deviations = {name: _deviation(rig, full, one) for name, one in served.items() if layers}
    answers = dict(zip(served, rig.decode(list(served.values()), max_new_tokens), strict=True))
    return {
        "methods": {
            name: {
                "ttft_s": statistics.median(times[name]),
                **against(full, one),
                "greedy_agreement": agreement(answers[FULL.name], answers[name]),
                **({"kv_deviation": deviations[name]} if layers else {}),
                **_quality(rig.words(answers[name]), asked.reference),
            }
            for name, one in served.items()
        }
    }


def _deviation(rig: Rig, full: Served, other: Served) -> dict[str, Any] | None:
    kv = (rig.runner.slot_kv(served.slot) for served in (full, other))
    found = kv_deviation(other.result.plan, *kv)
    return asdict(found) if found else None


def _quality(answer: str, reference: str | None) -> dict[str, float]:
    if reference is None:
        return {}
    import sacrebleu

    from kvshare_mm.apps.bench.tasks.summaries import rouge_l

    return {
        "rouge_l": rouge_l(reference, answer),
        "bleu": sacrebleu.sentence_bleu(answer, [reference]).score,
    }


def summary(name: str, per_pair: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [p["methods"][name] for p in per_pair]
    full = [p["methods"][FULL.name]["ttft_s"] for p in per_pair]
    tokens = sum(p["tokens"] for p in per_pair)

    def mean(of: str) -> float | None:
        found = [r[of] for r in rows if of in r]
        return statistics.mean(found) if found else None

    ttft = spread([r["ttft_s"] for r in rows], 50, 90)
    deviation = mean_deviation(
        [KVDeviation(**r["kv_deviation"]) for r in rows if r.get("kv_deviation")]
    )
    return {
        "ttft_s": {"median": ttft["p50"], "p90": ttft["p90"]},
        "speedup_vs_full": statistics.median(
            f / r["ttft_s"] for f, r in zip(full, rows, strict=True)
        ),
        "computed_share": sum(r["computed_tokens"] for r in rows) / tokens,
        "work_share": sum(r["work_tokens"] for r in rows) / tokens,
        "kl_first_token": spread([r["kl_first_token"] for r in rows], 50, 90),
        "first_token_agreement": mean("first_token_same"),
        "greedy_agreement": mean("greedy_agreement"),
        "declined": sum(r["declined"] is not None for r in rows),
        "rouge_l": mean("rouge_l"),
        "bleu": mean("bleu"),
        "kv_deviation": asdict(deviation) if deviation else None,
    }
