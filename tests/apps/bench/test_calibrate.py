"""The bound on divergence: fitted to one part of the pairs, checked on the other."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.calibrate import fitted, run
from kvshare_mm.apps.bench.prompts import is_fitted_to
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.reuse.divergence import divergence_bound


def _points(residual: np.ndarray, kl: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"residual": float(r), "kl_first_token": float(k)}
        for r, k in zip(residual, kl, strict=True)
    ]


def test_a_law_without_noise_is_found() -> None:
    residual = np.geomspace(1e-5, 1e-2, 50)
    scale, power = fitted(_points(residual, 7 * residual**1.5))
    assert (scale, power) == pytest.approx((7, 1.5))


def test_the_fitted_bound_is_kept_by_95_percent() -> None:
    rng = np.random.default_rng(0)
    residual = rng.uniform(1e-5, 1e-2, 1000)
    kl = residual * rng.lognormal(0, 1, 1000)
    scale, power = fitted(_points(residual, kl))
    assert (kl <= scale * residual**power).mean() == pytest.approx(0.95, abs=0.002)


def test_nothing_to_fit_to_is_said() -> None:
    with pytest.raises(ConfigError, match="too few pairs"):
        fitted(_points(np.zeros(9), np.zeros(9)))


def test_the_checked_part_is_what_nothing_was_fitted_to(
    rig: Rig, pairs: list[dict[str, Any]]
) -> None:
    names = [f"p{i}" for i in range(40)]
    seen = next(n for n in names if is_fitted_to(n))
    unseen = next(n for n in names if not is_fitted_to(n))
    named = [{**pairs[0], "id": seen}, {**pairs[1], "id": unseen}]
    report = run(rig, named, [0.1, 10.0])
    json.dumps(report, allow_nan=False)
    assert report["fitted"]["pairs"] == 1
    tight, loose = report["checked"]["auto:0.1"], report["checked"]["auto:10"]
    assert tight["pairs"] == loose["pairs"] == 1
    assert tight["computed_share"] >= loose["computed_share"]
    assert 0 <= tight["reused_of_reusable"] <= loose["reused_of_reusable"] <= 1
    [row] = [r for r in report["per_pair"] if r["id"] == unseen]
    aimed = [row["points"][name] for name in report["checked"]]
    points = [p for p in aimed if p["residual"] > 0]
    assert report["observed"] == [p["kl_first_token"] for p in points]
    assert report["predicted"] == [divergence_bound(p["residual"]) for p in points]
    assert len(rig.donors.tree) == 0
