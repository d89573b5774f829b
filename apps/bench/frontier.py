"""`kvshare bench frontier`: divergence against what is computed, all methods on one picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kvshare_mm.apps.bench.divergence import against, spread
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import Asked, measured_pairs
from kvshare_mm.apps.bench.methods import FULL, Method
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.reuse.divergence import residual_risk


def run(
    rig: Rig,
    pairs: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    *,
    what: str = "similar prompts",
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Serve every pair's target by every method at each of its budgets; nothing is decoded.

    Args:
        rig: one slot is enough.
        methods: each at `Method.at_budgets`, and at its own policy.
        what: the pairs are of.
        journal: results that are known already, and where new ones are kept.

    Returns:
        The report as JSON-ready data. A point has ``policy``, ``computed_share`` (positions),
        ``work_share`` (positions through all layers, a policy's own probes included),
        ``kl_first_token`` in nats, and ``first_token_agreement``.

    Raises:
        ConfigError: no pair could be served.
    """
    points = [(m, p) for m in methods if m is not FULL for p in _points(m)]
    rows, skipped = measured_pairs(
        rig, pairs, lambda asked: at_points(rig, asked, [p for _, p in points]), journal
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for method, point in points:
        found.setdefault(method.name, []).append(_summary(point, rows))
    return {
        "kind": "frontier",
        "model": rig.loaded.name,
        "pairs": len(rows),
        "what": what,
        "skipped": skipped,
        "methods": {
            name: sorted(those, key=lambda p: p["work_share"]) for name, those in found.items()
        },
        "per_pair": rows,
    }


def at_points(rig: Rig, asked: Asked, points: Sequence[Method]) -> dict[str, Any]:
    """Every point of a target beside full recompute, and the risk that its plan leaves."""
    full = rig.serve(asked.target, asked.ns, FULL)
    served = {point.name: rig.serve(asked.target, asked.ns, point) for point in points}
    return {
        "points": {
            name: {**against(full, one), "residual": residual_risk(one.result.plan)}
            for name, one in served.items()
        }
    }


def _points(method: Method) -> tuple[Method, ...]:
    at_budgets = method.at_budgets()
    if method.repair is None and method not in at_budgets:
        # The project's default need not be one of the budgets.
        return (method, *at_budgets)
    return at_budgets


def _summary(point: Method, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parts = [row["points"][point.name] for row in rows]
    tokens = sum(row["tokens"] for row in rows)
    return {
        "policy": point.repair or "default",
        "computed_share": sum(p["computed_tokens"] for p in parts) / tokens,
        "work_share": sum(p["work_tokens"] for p in parts) / tokens,
        "kl_first_token": spread([p["kl_first_token"] for p in parts], 50, 90),
        "first_token_agreement": statistics.mean(p["first_token_same"] for p in parts),
    }
