"""Requests served from a DELTA tree."""

from __future__ import annotations

from kvshare_mm.node import Node
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.reuse.repair import NoRepair, RepairPolicy
from kvshare_mm.reuse.tree import DeltaTree

from .plans import EAGER, to_keys


def serve(tree: DeltaTree, node_id: str, keys, donors=(), options=EAGER, repair=None) -> Node:
    """Plan a request with `donors` of the tree and insert it."""
    keys = to_keys(keys)
    plan = make_plan(keys, [tree.donor(d) for d in donors], options)
    policy: RepairPolicy = repair or NoRepair()
    node = tree.derive(node_id, "ns", keys, plan.with_repair(policy.positions(plan)), 0.0)
    tree.insert(node)
    return node
