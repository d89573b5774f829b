"""`kvshare bench calibrate`: what divergence does a plan's residual risk stand for?

Fits the bound of `kvshare_mm.divergence` to one part of the pairs and checks it on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_mm.apps.bench.divergence import kl_divergence
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import measured
from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.prompts import encode, is_fitted_to
from kvshare_mm.apps.bench.rig import Rig, machine
from kvshare_mm.divergence import BOUND_POWER, BOUND_SCALE, divergence_bound, residual_risk
from kvshare_mm.errors import ConfigError, InvalidRequestError

_FULL = METHODS["full"]
_QUANTILE = 0.95
# Below this, KL is rounding.
_FLOOR = 1e-7

Point = dict[str, Any]


def run(
    rig: Rig,
    pairs: Sequence[dict[str, Any]],
    targets: Sequence[float],
    *,
    journal: Journal | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Serve every pair's target at each divergence target and compare with full recompute.

    Args:
        rig: one slot is enough.
        targets: KL (nats), each as the policy ``auto:KL``.
        journal: results that are known already, and where new ones are kept.

    Returns:
        The report as JSON-ready data: the bound in force, the one fitted to one part of the pairs,
        and per target how the other part did. ``predicted`` and ``observed`` are that part's
        requests that reused anything, at all targets.

    Raises:
        ConfigError: no pair could be served, or one of the two parts is without reuse.
    """
    methods = [Method(f"auto:{t:g}", "", "on", f"auto:{t:g}") for t in targets]
    found, skipped = measured(
        pairs,
        lambda pair: _measure(rig, pair, methods),
        keys=([index, pair] for index, pair in enumerate(pairs)),
        names=(pair["id"] for pair in pairs),
        noun="pair",
        title="Measuring pairs",
        journal=journal or Journal(None, None),
        progress=progress,
    )
    rows = [row for _, row in found]
    fit = [r for r in rows if is_fitted_to(str(r["id"]))]
    check = [r for r in rows if not is_fitted_to(str(r["id"]))]
    reusing = [p for r in check for p in r["points"].values() if p["residual"] > 0]
    scale, power = fitted([p for r in fit for p in r["points"].values()])
    if not reusing:
        raise ConfigError("the part of the pairs that is checked reuses nothing")
    return {
        "kind": "reliability",
        "machine": machine(),
        "model": rig.loaded.name,
        "pairs": len(rows),
        "skipped": skipped,
        "bound": {"scale": BOUND_SCALE, "power": BOUND_POWER},
        "fitted": {"scale": scale, "power": power, "pairs": len(fit)},
        "checked": {
            m.name: _summary(check, m.name, t) for m, t in zip(methods, targets, strict=True)
        },
        "predicted": [divergence_bound(p["residual"]) for p in reusing],
        "observed": [p["kl_first_token"] for p in reusing],
        "per_pair": rows,
    }


def fitted(points: Sequence[Point]) -> tuple[float, float]:
    """Scale and power of a bound that 95% of `points` keep.

    The power is the slope of log KL over log residual risk (least squares); the scale lifts the
    line above 95% of the points.

    Raises:
        ConfigError: too few points that reuse anything.
    """
    usable = [p for p in points if p["residual"] > 0]
    if len({p["residual"] for p in usable}) < 2:
        raise ConfigError("too few pairs that reuse anything to fit a bound to")
    x = np.log([p["residual"] for p in usable])
    y = np.log([max(p["kl_first_token"], _FLOOR) for p in usable])
    power = float(np.polyfit(x, y, 1)[0])
    return float(np.exp(np.quantile(y - power * x, _QUANTILE))), power


def _measure(rig: Rig, pair: dict[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    donor, target = encode(rig, pair["donor"]), encode(rig, pair["target"])
    if max(len(donor), len(target)) > rig.max_len:
        raise InvalidRequestError(f"longer than {rig.max_len} tokens", "target")
    ns = rig.namespace(f"calibrate-{pair['id']}")
    stored = rig.capture(donor, ns, rig.serve(donor, ns, _FULL))
    try:
        full = rig.serve(target, ns, _FULL).result.logits
        prefix = rig.serve(target, ns, METHODS["prefix"]).result.plan
        reusable = rig.serve(target, ns, METHODS["placeholders"]).result.plan
        points = {}
        for method in methods:
            result = rig.serve(target, ns, method).result
            points[method.name] = {
                "residual": residual_risk(result.plan),
                "kl_first_token": kl_divergence(full, result.logits),
                "first_token_same": bool(full.argmax() == result.logits.argmax()),
                "computed_tokens": result.plan.num_computed,
            }
    finally:
        if stored:
            rig.donors.delete(stored)
    return {
        "id": pair["id"],
        "tokens": len(target),
        "prefix_computed": prefix.num_computed,
        "least_computed": reusable.num_computed,
        "points": points,
    }


def _summary(rows: Sequence[dict[str, Any]], name: str, target: float) -> dict[str, Any]:
    parts = [r["points"][name] for r in rows]
    computed = sum(p["computed_tokens"] for p in parts)
    tokens = sum(r["tokens"] for r in rows)
    kls = [p["kl_first_token"] for p in parts]
    return {
        "pairs": len(rows),
        "kl_first_token_mean": float(np.mean(kls)),
        "kl_within_target": float(np.mean([kl <= target for kl in kls])),
        "first_token_agreement": float(np.mean([p["first_token_same"] for p in parts])),
        "computed_share": computed / tokens,
        "computed_of_prefix": computed / sum(r["prefix_computed"] for r in rows),
        "reused_of_reusable": (tokens - computed)
        / max(1, tokens - sum(r["least_computed"] for r in rows)),
    }
