"""`kvshare bench frontier`: divergence against what is computed, all methods on one picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kvshare_mm.apps.bench.divergence import kl_divergence
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import measured
from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig, machine, spread
from kvshare_mm.errors import InvalidRequestError

_FULL = METHODS["full"]


def run(
    rig: Rig,
    pairs: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    *,
    journal: Journal | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Serve every pair's target by every method at each of its budgets; nothing is decoded.

    Args:
        rig: one slot is enough.
        methods: each at `Method.at_budgets`, and at its own policy.
        journal: results that are known already, and where new ones are kept.

    Returns:
        The report as JSON-ready data. A point has ``policy``, ``computed_share`` (positions),
        ``work_share`` (positions through all layers, a policy's own probes included),
        ``kl_first_token`` in nats, and ``first_token_agreement``.

    Raises:
        ConfigError: no pair could be served.
    """
    points = [(m, p) for m in methods if m is not _FULL for p in _points(m)]
    found_rows, skipped = measured(
        pairs,
        lambda pair: _measure(rig, pair, [p for _, p in points]),
        keys=([index, pair] for index, pair in enumerate(pairs)),
        names=(pair["id"] for pair in pairs),
        noun="pair",
        title="Measuring pairs",
        journal=journal or Journal(None, None),
        progress=progress,
    )
    rows = [row for _, row in found_rows]
    found: dict[str, list[dict[str, Any]]] = {}
    for method, point in points:
        found.setdefault(method.name, []).append(_summary(point, rows))
    return {
        "kind": "frontier",
        "machine": machine(),
        "model": rig.loaded.name,
        "pairs": len(rows),
        "skipped": skipped,
        "methods": {
            name: sorted(those, key=lambda p: p["work_share"]) for name, those in found.items()
        },
        "per_pair": rows,
    }


def _points(method: Method) -> tuple[Method, ...]:
    at_budgets = method.at_budgets()
    if method.repair is None and method not in at_budgets:
        # The project's default need not be one of the budgets.
        return (method, *at_budgets)
    return at_budgets


def _measure(rig: Rig, pair: dict[str, Any], points: Sequence[Method]) -> dict[str, Any]:
    donor, target = encode(rig, pair["donor"]), encode(rig, pair["target"])
    if max(len(donor), len(target)) > rig.max_len:
        raise InvalidRequestError(f"longer than {rig.max_len} tokens", "target")
    ns = rig.namespace(f"frontier-{pair['id']}")
    stored = rig.capture(donor, ns, rig.serve(donor, ns, _FULL))
    try:
        full = rig.serve(target, ns, _FULL).result.logits
        results = {}
        for point in points:
            one = rig.serve(target, ns, point)
            results[point.name] = {
                "computed_tokens": one.result.plan.num_computed,
                "work_tokens": one.work,
                "kl_first_token": kl_divergence(full, one.result.logits),
                "first_token_same": bool(full.argmax() == one.result.logits.argmax()),
            }
    finally:
        if stored:
            rig.donors.delete(stored)
    return {"id": pair["id"], "tokens": len(target), "points": results}


def _summary(point: Method, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parts = [row["points"][point.name] for row in rows]
    tokens = sum(row["tokens"] for row in rows)
    return {
        "policy": point.repair or "default",
        "computed_share": sum(p["computed_tokens"] for p in parts) / tokens,
        "work_share": sum(p["work_tokens"] for p in parts) / tokens,
        "kl_first_token": spread([p["kl_first_token"] for p in parts]),
        "first_token_agreement": statistics.mean(p["first_token_same"] for p in parts),
    }
