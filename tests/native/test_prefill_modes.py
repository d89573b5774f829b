"""A request that shares nothing, or exact prefixes only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvshare_mm.native.prefill import Prefiller, provenance
from kvshare_mm.native.slots import PlainRunner, SlotRunner
from kvshare_mm.reuse.plan import Decline
from kvshare_mm.stream import text_stream

from .donor_server import ATOL, NO_REPAIR, NS, OPTIONS, Server, _assert_adds_up, _edited, _ids


def test_reuse_off(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(ids, reuse="off")
    server.assert_full(ids, result)
    assert provenance(result).declined == "reuse_off"


def test_reuse_exact_takes_the_prefix_only(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 30)
    result = server.prefill(target, reuse="exact")
    assert (result.plan.num_exact, result.plan.num_reused) == (30, 0)
    assert result.plan.declined == Decline.EXACT_ONLY
    assert torch.allclose(result.logits, server.tiny.full(target).logits[-1], atol=ATOL)


def test_reuse_exact_takes_nothing_from_an_approximate_donor(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 3, 30)
    server.serve(target)  # stored, exact only up to the first edit
    for asked in (target, np.concatenate((target, _ids(10, 3)))):
        result = server.prefill(asked, reuse="exact")
        assert (result.plan.num_exact, result.plan.num_reused) == (4, 0)
        assert torch.allclose(result.logits, server.tiny.full(asked).logits[-1], atol=ATOL)


def test_reuse_exact_is_not_asked_for_similar_ones(server: Server) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    target = np.concatenate((_ids(5, 3), ids))
    result = server.prefill(target, reuse="exact", similar=(donor,))
    server.assert_full(target, result)


def test_without_donors_or_with_a_plain_runner(tiny_llama: Any) -> None:
    ids = _ids(30, 0)
    alone = Prefiller(SlotRunner(tiny_llama.loaded, 1, 64, 64), None, OPTIONS, NO_REPAIR)
    result = alone.prefill(0, text_stream(ids), NS)
    assert result.plan.declined == Decline.REUSE_OFF
    assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)

    class Reference:
        model, device = tiny_llama.reference, torch.device("cpu")

    runner = PlainRunner(Reference(), 1)  # type: ignore[arg-type]
    plain = Prefiller(runner, None, OPTIONS, NO_REPAIR)
    result = plain.prefill(0, text_stream(ids), NS)
    assert result.plan.declined == Decline.UNSUPPORTED_MODEL
    assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)
    _assert_adds_up(result, provenance(result))
