"""Any history of requests that are edits of one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.repair import make_policy

from .donor_server import ATOL, MAX_LEN, NS, OTHER_NS, Server, _evict, _ids


def _variant(draw: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
    """A random edit: tokens replaced, put in, left out, blocks moved, ends cut."""
    kind = draw(st.sampled_from(["replace", "insert", "delete", "move", "cut", "grow", "same"]))
    at = draw(st.integers(0, len(ids) - 1))
    n = draw(st.integers(1, 8))
    fresh = _ids(n, draw(st.integers(100, 110)))
    if kind == "replace":
        ids = np.concatenate((ids[:at], fresh, ids[at + n :]))
    elif kind == "insert":
        ids = np.concatenate((ids[:at], fresh, ids[at:]))
    elif kind == "delete":
        ids = np.concatenate((ids[:at], ids[at + n :]))
    elif kind == "move":
        ids = np.concatenate((ids[at:], ids[:at]))
    elif kind == "cut":
        ids = ids[: max(20, at)]
    elif kind == "grow":
        ids = np.concatenate((ids, fresh))
    return ids[:MAX_LEN] if len(ids) >= 20 else _ids(20, 99)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_history_of_requests(tiny_llama: Any, data: st.DataObject) -> None:
    """Requests that are edits of one another, in two namespaces, with donors lost on the way.

    `Server.prefill` checks every answer against full prefills and against what donors held.
    """
    server = Server(tiny_llama, chunk=data.draw(st.sampled_from([16, 4096])))
    seen = [_ids(40, 0), _ids(55, 1)]
    for _ in range(data.draw(st.integers(3, 9))):
        ids = _variant(data.draw, seen[data.draw(st.integers(0, len(seen) - 1))])
        seen.append(ids)
        ns = data.draw(st.sampled_from([NS, NS, NS, OTHER_NS]))
        reuse = data.draw(st.sampled_from(["similar", "similar", "similar", "exact", "off"]))
        spec = data.draw(st.sampled_from(["none", "window:2", "tail:3", "auto"]))
        known = tuple(server.served)
        result = server.prefill(ids, ns, reuse=reuse, policy=make_policy(spec), similar=known[-2:])
        if reuse == "exact":
            assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)
        if data.draw(st.booleans()):
            server.save(ids, result, ns)
        if known and data.draw(st.integers(0, 3)) == 0:
            lost = data.draw(st.sampled_from(known))
            if data.draw(st.booleans()):
                server.pool.delete(lost)
            else:
                _evict(server, lost)
    server.pool.close()
