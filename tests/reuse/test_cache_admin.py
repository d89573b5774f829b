"""Administration of donors, with a real pool behind it; over HTTP in apps/server."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvshare_mm import KVShare, RequestOptions, SamplingParams
from kvshare_mm.node import Node, Span
from kvshare_mm.reuse.admin import CacheAdmin

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
_DONOR = f"Laboratory report. Patient number 48210. {_ROWS} What is value 3?"
_TARGET = f"Laboratory report. Patient number 77. {_ROWS} What is value 3?"
_SHORT = SamplingParams(max_tokens=2)


def test_donors_are_listed_looked_up_pinned_and_deleted_by_namespace(
    open_llm: Callable[..., Any],
) -> None:
    llm: KVShare = open_llm(repair="none")
    for prompt, salt in ((_DONOR, ""), (_TARGET, ""), (_DONOR, "other")):
        llm.generate(prompt, _SHORT, RequestOptions(cache_salt=salt))
        llm.flush()
    child, parent = llm.cache.list(llm.namespace())
    assert (child.parent, child.depth, parent.parent, parent.depth) == (parent.donor_id, 1, None, 0)
    assert 0 < child.num_owned < child.num_tokens
    assert parent.num_owned == parent.num_tokens
    assert {child.tier, parent.tier} == {"host"}
    [other] = llm.cache.list(llm.namespace("other"))
    assert len(llm.cache.list()) == 3
    assert llm.cache.get(other.donor_id) == other
    text = llm.cache.text(parent.donor_id)
    assert text is not None and text.startswith(_DONOR)

    assert llm.cache.pin(other.donor_id, 100) and llm.cache.pin(other.donor_id, 50)
    pinned = llm.cache.get(other.donor_id)
    assert pinned is not None and 0 < pinned.pinned_s <= 50
    assert llm.cache.unpin(other.donor_id)
    assert llm.cache.get(other.donor_id) == other and not llm.cache.unpin(other.donor_id)
    for call in (llm.cache.get, llm.cache.text, llm.cache.delete, lambda x: llm.cache.pin(x, 5)):
        assert not call("nobody")

    found = llm.lookup(_TARGET.replace("77", "91"))
    unstored = RequestOptions(store=False)
    use = llm.generate(_TARGET.replace("77", "91"), _SHORT, unstored).provenance
    assert found is not None and found.plan.num_reused > 50
    assert (found.plan.num_exact, found.plan.num_reused) == (use.exact, use.reused)
    exact = llm.lookup(_TARGET, RequestOptions(reuse="exact"))
    assert exact is not None and exact.plan.num_reused == 0
    assert llm.lookup(_TARGET, RequestOptions(reuse="off")) is None

    assert llm.cache.clear(llm.namespace()) == 2
    after = llm.lookup(_TARGET)
    assert after is not None and (after.plan.num_exact, after.plan.num_reused) == (0, 0)
    assert llm.cache.list() == [other]
    assert llm.cache.delete(other.donor_id) and llm.cache.list() == []


class Store:
    """Counts who holds a node."""

    def __init__(self) -> None:
        self.holders: Counter[str] = Counter()

    def pin(self, node_id: str, ttl_s: float) -> None:
        self.holders[node_id] += 1

    def unpin(self, node_id: str) -> None:
        self.holders[node_id] -= 1

    def resident(self, node_id: str) -> str:
        return "host"


class Contended:
    """A lock that another one uses, for `work`, whenever it is let go of."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._work = work
        self._theirs = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if not self._theirs:
            self._theirs = True
            self._work()
            self._theirs = False


def test_however_many_pin_a_donor_at_once_it_is_unpinned_once() -> None:
    node = Node("a", "ns", np.arange(8, dtype=np.uint64), (Span(0, 8),))
    store = Store()
    admin = CacheAdmin(SimpleNamespace(store=store, nodes=lambda: [node]), None)  # type: ignore[arg-type]
    admin._lock = Contended(lambda: admin.pin("a", 50))  # type: ignore[assignment]
    assert admin.pin("a", 100)
    assert store.holders["a"] == 1
    admin._lock = threading.Lock()
    assert admin.unpin("a") and not admin.unpin("a")
    assert store.holders["a"] == 0
