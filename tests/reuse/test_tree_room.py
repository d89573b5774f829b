"""What the DELTA tree is for: many similar requests take little room."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_mm.node import Node
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.reuse.repair import BoundaryWindow, NoRepair, RepairPolicy
from kvshare_mm.reuse.tree import DeltaTree

from .plans import to_keys


def lab_reports(count: int) -> list[np.ndarray]:
    """Reports of one form of 400 words that differ in 30 numbers."""
    rng = np.random.default_rng(0)
    form, at = rng.integers(1000, 1400, 400), 60 + 10 * np.arange(30)
    reports = np.tile(form, (count, 1))
    reports[:, at] = rng.integers(0, 300, (count, 30))
    return [to_keys(report.tolist()) for report in reports]


def serve(tree: DeltaTree, node_id: str, keys, donors, repair: RepairPolicy) -> Node:
    """Plan a request with `donors` of the tree and insert it."""
    plan = make_plan(keys, [tree.donor(d) for d in donors], PlannerOptions())
    node = tree.derive(node_id, "ns", keys, plan.with_repair(repair.positions(plan)), 0.0)
    tree.insert(node)
    return node


@pytest.mark.parametrize("repair", [NoRepair(), BoundaryWindow(1)], ids=["no repair", "window"])
def test_a_hundred_lab_reports_take_a_fifth_of_the_room(repair):
    """Served each by the latest report, and by the one that owns most of what that one shows.

    The second matters with repairs: a repaired position is no reusable, so reports that know only
    the one before them would repair more and more of it.
    """
    tree = DeltaTree()
    computed = []
    for i, keys in enumerate(lab_reports(100)):
        donors = []
        if i:
            borrowed = tree[f"r{i - 1}"].owners
            donors = [f"r{i - 1}", *sorted(borrowed, key=lambda o: -borrowed[o])[:1]]
        computed.append(serve(tree, f"r{i}", keys, donors, repair).num_owned)
    lengths = [len(node) for node in tree]
    assert tree.num_tokens_whole == sum(lengths)
    assert tree.num_tokens_owned == sum(computed)
    assert tree.num_tokens_owned * 5 <= tree.num_tokens_whole
    # Reuse does not wear out with the generations.
    assert np.mean(computed[-20:]) <= 1.1 * np.mean(computed[1:21])
    # The first report is read by all, and nobody's KV is needed through more than one step.
    assert all("r0" in node.owners for node in tree if node.node_id != "r0")
