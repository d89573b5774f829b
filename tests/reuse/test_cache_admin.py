"""Administration of donors, with a real pool behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvshare_mm import KVShare, RequestOptions, SamplingParams

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
_DONOR = f"Laboratory report. Patient number 48210. {_ROWS} What is value 3?"
_TARGET = f"Laboratory report. Patient number 77. {_ROWS} What is value 3?"
_SHORT = SamplingParams(max_tokens=2)


@pytest.fixture
def llm(open_llm: Callable[..., Any]) -> KVShare:
    opened: KVShare = open_llm(repair="none")
    opened.generate(_DONOR, _SHORT)
    opened.flush()
    opened.generate(_TARGET, _SHORT)
    opened.generate(_DONOR, _SHORT, RequestOptions(cache_salt="other"))
    opened.flush()
    return opened


def test_donors_are_listed_by_namespace(llm: KVShare) -> None:
    assert llm.cache is not None
    child, parent = llm.cache.list(llm.namespace())
    assert (child.parent, parent.parent) == (parent.donor_id, None)
    assert (child.depth, parent.depth) == (1, 0)
    assert 0 < child.num_owned < child.num_tokens
    assert parent.num_owned == parent.num_tokens
    assert {child.tier, parent.tier} == {"host"}
    [other] = llm.cache.list(llm.namespace("other"))
    assert len(llm.cache.list()) == 3
    assert llm.cache.get(other.donor_id) == other
    assert llm.cache.get("nobody") is None


def test_text_comes_back(llm: KVShare) -> None:
    assert llm.cache is not None
    parent = llm.cache.list(llm.namespace())[1]
    text = llm.cache.text(parent.donor_id)
    assert text is not None and text.startswith(_DONOR)
    assert llm.cache.text("nobody") is None


def test_pins_end(llm: KVShare) -> None:
    assert llm.cache is not None
    donor = llm.cache.list()[0].donor_id
    assert llm.cache.pin(donor, 100) and llm.cache.pin(donor, 50)
    pinned = llm.cache.get(donor)
    assert pinned is not None and 0 < pinned.pinned_s <= 50
    assert llm.cache.unpin(donor)
    unpinned = llm.cache.get(donor)
    assert unpinned is not None and unpinned.pinned_s == 0
    assert not llm.cache.unpin(donor)
    assert not llm.cache.pin("nobody", 5)


def test_what_is_deleted_is_not_reused(llm: KVShare) -> None:
    assert llm.cache is not None
    before = llm.lookup(_TARGET)
    assert before is not None and before.plan.num_reused > 50
    assert llm.cache.clear(llm.namespace()) == 2
    after = llm.lookup(_TARGET)
    assert after is not None and (after.plan.num_exact, after.plan.num_reused) == (0, 0)
    [other] = llm.cache.list()
    assert llm.cache.delete(other.donor_id) and not llm.cache.delete(other.donor_id)
    assert llm.cache.list() == []


def test_a_lookup_tells_what_the_request_then_reuses(llm: KVShare) -> None:
    prompt = _TARGET.replace("77", "91")
    found = llm.lookup(prompt)
    output = llm.generate(prompt, _SHORT, RequestOptions(store=False))
    assert found is not None
    assert (found.plan.num_exact, found.plan.num_reused) == (
        output.provenance.exact,
        output.provenance.reused,
    )
    exact = llm.lookup(prompt, RequestOptions(reuse="exact"))
    assert exact is not None and exact.plan.num_reused == 0
    assert llm.lookup(prompt, RequestOptions(reuse="off")) is None


def test_logprobs_come_with_their_tokens(llm: KVShare) -> None:
    params = SamplingParams(max_tokens=3, logprobs=1, ignore_eos=True)
    chunks = list(llm.stream(_TARGET, params))
    output = chunks[-1].output
    assert output is not None and output.logprobs is not None
    told = tuple(x for chunk in chunks for x in chunk.logprobs)
    # A last token that adds no text comes with the output only.
    assert told and told == output.logprobs[: len(told)]
    assert [len(chunk.logprobs) for chunk in chunks] == [len(chunk.token_ids) for chunk in chunks]
