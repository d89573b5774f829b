"""`kvshare bench calibrate`: what divergence does a plan's residual risk stand for?

Fits the bound of `kvshare_mm.reuse.divergence` to one part of the pairs and checks it on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_mm.apps.bench.frontier import at_points
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import measured_pairs
from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.prompts import is_fitted_to
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.errors import ConfigError
from kvshare_mm.reuse.divergence import BOUND_POWER, BOUND_SCALE, divergence_bound

# What must be computed, and the least that can be.
_MOST, _LEAST = METHODS["prefix"], METHODS["placeholders"]
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
    aims = {f"auto:{target:g}": target for target in targets}
    points = [_MOST, _LEAST, *(Method(name, "", "similar", name) for name in aims)]
    rows, skipped = measured_pairs(rig, pairs, lambda asked: at_points(rig, asked, points), journal)
    fit = [r for r in rows if is_fitted_to(str(r["id"]))]
    check = [r for r in rows if not is_fitted_to(str(r["id"]))]
    scale, power = fitted([r["points"][name] for r in fit for name in aims])
    checked = [r["points"][name] for r in check for name in aims]
    reusing = [point for point in checked if point["residual"] > 0]
    if not reusing:
        raise ConfigError("the part of the pairs that is checked reuses nothing")
    return {
        "kind": "reliability",
        "model": rig.loaded.name,
        "pairs": len(rows),
        "skipped": skipped,
        "bound": {"scale": BOUND_SCALE, "power": BOUND_POWER},
        "fitted": {"scale": scale, "power": power, "pairs": len(fit)},
        "checked": {name: _summary(check, name, target) for name, target in aims.items()},
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


def _summary(rows: Sequence[dict[str, Any]], name: str, target: float) -> dict[str, Any]:
    def computed(by: str) -> int:
        return sum(r["points"][by]["computed_tokens"] for r in rows)

    parts = [r["points"][name] for r in rows]
    tokens = sum(r["tokens"] for r in rows)
    kls = [p["kl_first_token"] for p in parts]
    return {
        "pairs": len(rows),
        "kl_first_token_mean": float(np.mean(kls)),
        "kl_within_target": float(np.mean([kl <= target for kl in kls])),
        "first_token_agreement": float(np.mean([p["first_token_same"] for p in parts])),
        "computed_share": computed(name) / tokens,
        "computed_of_prefix": computed(name) / computed(_MOST.name),
        "reused_of_reusable": (tokens - computed(name)) / max(1, tokens - computed(_LEAST.name)),
    }
