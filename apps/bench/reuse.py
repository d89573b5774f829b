"""`kvshare bench reuse`: methods side by side on pairs of similar prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvshare_mm.apps.bench.divergence import (
    KVDeviation,
    agreement,
    kl_divergence,
    kv_deviation,
    mean_deviation,
)
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import measured
from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig, Served, machine, spread
from kvshare_mm.errors import InvalidRequestError

_FULL = METHODS["full"]


def with_full(methods: Sequence[Method]) -> list[Method]:
    """The methods with full recompute first: the others are compared with it."""
    return [_FULL, *(m for m in methods if m is not _FULL)]


def run(
    rig: Rig,
    pairs: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
    layers: bool = False,
    journal: Journal | None = None,
    progress: bool = True,
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
    found, skipped = measured(
        pairs,
        lambda pair: _measure(rig, pair, methods, max_new_tokens, repeats, layers),
        keys=([index, pair] for index, pair in enumerate(pairs)),
        names=(pair["id"] for pair in pairs),
        noun="pair",
        title="Measuring pairs",
        journal=journal or Journal(None, None),
        progress=progress,
    )
    per_pair = [row for _, row in found]
    return {
        "kind": "reuse",
        "machine": machine(),
        "model": rig.loaded.name,
        "dtype": str(rig.loaded.dtype).removeprefix("torch."),
        "pairs": len(per_pair),
        "skipped": skipped,
        "repeats": repeats,
        "max_new_tokens": max_new_tokens,
        "methods": {m.name: _summary(m.name, per_pair) for m in methods},
        "per_pair": per_pair,
    }


def _measure(
    rig: Rig,
    pair: dict[str, Any],
    methods: Sequence[Method],
    max_new_tokens: int,
    repeats: int,
    layers: bool,
) -> dict[str, Any]:
    donor, target = encode(rig, pair["donor"]), encode(rig, pair["target"])
    longest = rig.max_len - max_new_tokens
    if max(len(donor), len(target)) > longest:
        raise InvalidRequestError(f"longer than {longest} tokens", "target")
    ns = rig.namespace(f"bench-{pair['id']}")
    stored = rig.capture(donor, ns, rig.serve(donor, ns, _FULL))
    times: dict[str, list[float]] = {m.name: [] for m in methods}
    served: dict[str, Served] = {}
    try:
        for _ in range(repeats):
            for slot, method in enumerate(methods):
                one = rig.serve(target, ns, method, slot)
                times[method.name].append(one.ttft)
                served[method.name] = one
    finally:
        if stored:
            rig.donors.delete(stored)
    deviations = {m.name: _deviation(rig, served, m.name) if layers else None for m in methods}
    answers = dict(zip(served, rig.decode(list(served.values()), max_new_tokens), strict=True))
    full = served[_FULL.name].result.logits
    return {
        "id": pair["id"],
        "tokens": len(target),
        "methods": {
            name: {
                "ttft_s": statistics.median(times[name]),
                "computed_tokens": one.result.plan.num_computed,
                "work_tokens": one.work,
                "declined": one.result.plan.declined,
                "kl_first_token": kl_divergence(full, one.result.logits),
                "first_token_same": bool(full.argmax() == one.result.logits.argmax()),
                "greedy_agreement": agreement(answers[_FULL.name], answers[name]),
                **({"kv_deviation": deviations[name]} if layers else {}),
                **_quality(rig, answers[name], pair.get("reference")),
            }
            for name, one in served.items()
        },
    }


def _deviation(rig: Rig, served: dict[str, Served], name: str) -> dict[str, Any] | None:
    found = kv_deviation(
        served[name].result.plan,
        rig.runner.slot_kv(served[_FULL.name].slot),
        rig.runner.slot_kv(served[name].slot),
    )
    return asdict(found) if found else None


def _quality(rig: Rig, answer: list[int], reference: str | None) -> dict[str, float]:
    if reference is None:
        return {}
    import sacrebleu

    from kvshare_mm.apps.bench.tasks.summaries import rouge_l

    text = rig.loaded.tokenizer.decode(answer, skip_special_tokens=True)
    return {
        "rouge_l": rouge_l(reference, text),
        "bleu": sacrebleu.sentence_bleu(text, [reference]).score,
    }


def _summary(name: str, per_pair: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [p["methods"][name] for p in per_pair]
    ttft = spread([r["ttft_s"] for r in rows])
    full = [p["methods"][_FULL.name]["ttft_s"] for p in per_pair]
    tokens = sum(p["tokens"] for p in per_pair)
    quality = {
        key: statistics.mean(r[key] for r in rows if key in r)
        for key in ("rouge_l", "bleu")
        if any(key in r for r in rows)
    }
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
        "kl_first_token": spread([r["kl_first_token"] for r in rows]),
        "first_token_agreement": statistics.mean(r["first_token_same"] for r in rows),
        "greedy_agreement": statistics.mean(r["greedy_agreement"] for r in rows),
        "declined": sum(r["declined"] is not None for r in rows),
        "rouge_l": quality.get("rouge_l"),
        "bleu": quality.get("bleu"),
        "kv_deviation": asdict(deviation) if deviation else None,
    }
