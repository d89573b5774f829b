"""Donors on disk serve again after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.disk import DiskTier

from .donor_server import ATOL, OTHER_NS, Server, _edited, _ids


def test_donors_survive_a_restart(tiny_llama: Any, tmp_path: Path) -> None:
    first = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    a = _ids(60, 0)
    b = _edited(a, 20)
    _, node_a = first.serve(a)
    _, node_b = first.serve(b)
    _, theirs = first.serve(_ids(60, 1), OTHER_NS)
    asked = [a, b, _edited(a, 40), _edited(b, 5, 50), np.concatenate((b, _ids(9, 2)))]
    before = [first.prefill(ids) for ids in asked]
    first.pool.close()

    second = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    second.served, second.namespaces = first.served, first.namespaces
    assert {n.node_id for n in second.pool.tree} == {node_a, node_b, theirs}
    assert second.pool.counters["restored"] == 3
    for ids, was in zip(asked, before, strict=True):
        now = second.prefill(ids)
        assert now.fallback is None
        assert now.plan.num_exact == was.plan.num_exact
        assert now.plan.num_reused == was.plan.num_reused > 0 or was.plan.num_reused == 0
        assert torch.allclose(now.logits, was.logits, atol=ATOL)
    result = second.prefill(_ids(60, 1))
    second.assert_full(_ids(60, 1), result)
    assert second.prefill(_ids(60, 1), OTHER_NS).plan.donors == (theirs,)
    second.pool.close()


def test_nodes_of_another_model_are_left_alone(tiny_llama: Any, tmp_path: Path) -> None:
    first = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    a = _ids(60, 0)
    first.serve(a, namespace("another model", ""))
    first.serve(a)
    first.pool.close()
    second = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    assert len(second.pool.tree) == 1
    assert len(list(tmp_path.glob("*.kvnode"))) == 2
    second.pool.close()
