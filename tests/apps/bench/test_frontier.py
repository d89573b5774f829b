"""Divergence against work on a tiny model."""

from __future__ import annotations

import json
from typing import Any

from kvshare_mm.apps.bench.frontier import run
from kvshare_mm.apps.bench.methods import METHODS, pick
from kvshare_mm.apps.bench.rig import Rig


def test_points(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    report = run(rig, pairs[:2], list(METHODS.values()))
    json.dumps(report, allow_nan=False)
    assert report["kind"] == "frontier"
    found = report["methods"]
    assert set(found) == set(METHODS) - {"full"}  # the baseline has no point
    assert {len(found[name]) for name in ("prefix", "placeholders")} == {1}
    assert [p["policy"] for p in found["epic"]] == list(METHODS["epic"].budgets)
    assert "default" in {p["policy"] for p in found["kvshare"]}
    for points in found.values():
        work = [p["work_share"] for p in points]
        assert work == sorted(work)
        assert all(p["computed_share"] <= p["work_share"] + 1e-9 for p in points)
    [exact] = found["prefix"]
    assert exact["kl_first_token"]["mean"] < 1e-8
    assert exact["first_token_agreement"] == 1
    [cheapest] = found["placeholders"]
    assert cheapest["work_share"] == min(p["work_share"] for ps in found.values() for p in ps)
    assert cheapest["kl_first_token"]["mean"] > 0


def test_ad_hoc_policies_have_one_point(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    report = run(rig, pairs[:1], pick("repair=window:2"))
    [point] = report["methods"]["repair=window:2"]
    assert point["policy"] == "window:2"
