"""Who is expected to reuse most starts first, and nobody is overtaken for long."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.config import RequestOptions, Reuse
from kvshare_mm.native.request import SlotRequest
from kvshare_mm.native.waiting import WaitingRequests
from kvshare_mm.request import RequestSpec
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import text_stream

from .asking import _DONOR, _PROMPTS, _TARGET, Gate, Inbox, OpenLLM, inside, params


def request(
    length: int, overlap: float = 0.0, tenant: str = "", reuse: Reuse = "similar"
) -> SlotRequest:
    options = RequestOptions(tenant=tenant, reuse=reuse)
    spec = RequestSpec(text_stream(np.arange(length)), "", SamplingParams(), "ns", options)
    return SlotRequest(spec, Mock(), overlap=overlap)


def queue(*requests: SlotRequest) -> WaitingRequests:
    waiting = WaitingRequests(1000, Mock(done=0), 512)
    for one in requests:
        waiting.add(one.spec.options.tenant, one)
    return waiting


def started(waiting: WaitingRequests) -> SlotRequest:
    found = waiting.first([])
    assert found is not None
    waiting.start(found)
    waiting.charge(found.spec.options.tenant, round(found.expected_tokens))
    return found


def test_most_expected_to_be_reused_goes_first_and_else_who_came_first() -> None:
    new, little, much, also = request(800), request(100, 0.9), request(800, 0.9), request(800)
    exact = request(800, 0.95, reuse="exact")  # whose identical beginning may be short
    waiting = queue(new, exact, little, much, also)
    assert [started(waiting) for _ in range(5)] == [much, little, new, exact, also]


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.floats(0, 1), st.booleans()), min_size=1, max_size=40
    )
)
def test_nobody_is_overtaken_for_longer_than_its_own_prompt_takes(
    asked: list[tuple[int, float, bool]],
) -> None:
    """Requests keep coming, each followed by a start or not."""
    waiting, served = queue(), 0
    for length, overlap, starts in asked:
        waiting.add("", request(length, overlap))
        if starts:
            started(waiting)
            served += 1
        assert all(r.overtaken <= len(r.spec.stream) * (1 + 1e-9) for r in waiting)
    left = [started(waiting) for _ in range(len(asked) - served)]
    assert all(r.overtaken <= len(r.spec.stream) * (1 + 1e-9) for r in left)
    assert not waiting


def test_nobody_waits_for_ever_for_those_whose_prompts_are_there_already() -> None:
    new = request(800)
    waiting, starts = queue(new), list[SlotRequest]()
    while new not in starts and len(starts) < 100:
        waiting.add("", request(800, 1.0))
        starts.append(started(waiting))
    assert len(starts) == 9


def test_tenants_get_equal_shares_however_much_one_of_them_reuses() -> None:
    requests = [request(100, 0.5, "alike") for _ in range(40)]
    requests += [request(100, 0.0, "other") for _ in range(40)]
    waiting = queue(*requests)
    got = {"alike": 0.0, "other": 0.0}
    for _ in range(45):
        one = started(waiting)
        got[one.spec.options.tenant] += one.expected_tokens
        assert abs(got["alike"] - got["other"]) <= 100


def test_a_burst_of_several_families_is_sooner_done_on_the_mean() -> None:
    """Whose donor is there before whose is not: 4 families of 8, one of each in turn."""

    def mean_end(kept: float) -> float:
        families = {request(800): i % 4 for i in range(32)}
        waiting, now, ends = queue(*families), 0.0, []
        while waiting:
            one = started(waiting)
            donor_there = any(families[one] == family for family, _ in ends)
            now += 0.12 * 800 if donor_there else 800
            ends.append((families[one], now))
            for other in waiting:
                if families[other] == families[one]:
                    other.overlap = kept
        return float(np.mean([end for _, end in ends]))

    assert mean_end(0.9) < 0.9 * mean_end(0.0)


@pytest.mark.parametrize(
    ("length", "overlap", "left", "passes"),
    [(100, 0.0, 200, True), (100, 0.0, 199, False), (400, 0.8, 200, True), (600, 0.0, 5000, False)],
)
def test_a_prompt_is_passed_by_who_has_half_as_much_to_compute(
    length: int, overlap: float, left: int, passes: bool
) -> None:
    one, running = request(length, overlap), request(500)
    one.sketch, running.sketch = np.array([1]), np.array([2])
    running.computing = Mock(left=left)
    assert queue(one).first([running]) is (one if passes else None)


@pytest.mark.parametrize("known", [True, False])
def test_a_waiting_request_is_told_what_a_stored_donor_has(open_llm: OpenLLM, known: bool) -> None:
    llm = open_llm(max_num_seqs=1)
    if known:
        llm.generate(_DONOR, params(2))
        assert llm.flush()
    gate = Gate(inside(llm).runner, "prefill")
    first = Inbox(llm, _PROMPTS[0], params(2))
    gate.wait()
    similar = Gate(inside(llm).donors.reuse, "similar")  # asked behind it, on the same thread
    later, alike = Inbox(llm, _PROMPTS[3], params(2)), Inbox(llm, _TARGET, params(2))
    similar.wait()
    similar.open()
    engine = inside(llm).engine
    engine._searches._meaning.close()
    begin = engine._start = Mock(wraps=engine._start)
    gate.open()
    done = [inbox.result() for inbox in (first, later, alike)]
    assert (done[2].provenance.reused > 0) == known
    order = [call.args[0].request_id for call in begin.call_args_list]
    assert order == [i.request_id for i in ((alike, later) if known else (later, alike))]
