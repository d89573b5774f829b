"""The eviction policy, without tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.store.eviction import WINDOW, EvictionLedger

from ..helpers import Clock


def filled(max_bytes: int, *sizes: tuple[str, int]) -> EvictionLedger:
    ledger = EvictionLedger(max_bytes, Clock())
    for node_id, num_bytes in sizes:
        assert ledger.admit(node_id, num_bytes) == []
    return ledger


def test_of_equal_sizes_the_least_recently_used_goes():
    ledger = filled(30, ("a", 10), ("b", 10), ("c", 10))
    ledger.touch("a")
    assert ledger.admit("d", 10) == ["b"]
    assert list(ledger) == ["c", "a", "d"]
    assert ledger.num_bytes == 30


def test_a_big_node_goes_before_older_small_ones():
    ledger = filled(100, ("old small", 1), ("big", 90), ("new small", 1))
    assert ledger.admit("new", 10) == ["big"]


def test_a_small_node_goes_before_a_big_one_once_it_is_old_enough():
    ledger = filled(100, ("small", 10), ("big", 90))
    for _ in range(20):
        ledger.touch("big")
    assert ledger.admit("new", 10) == ["small"]


def test_no_more_goes_than_must():
    ledger = filled(100, *((f"n{i}", 10) for i in range(10)))
    assert ledger.admit("new", 25) == ["n0", "n1", "n2"]
    assert ledger.num_bytes == 95


def test_only_the_window_is_scored():
    ledger = filled(10_000, *((f"n{i}", 1) for i in range(WINDOW)), ("big", 9000))
    assert ledger.admit("new", 1000) == [f"n{i}" for i in range(1)] + ["big"]


def test_what_can_never_fit_evicts_nothing_and_takes_its_old_version_along():
    ledger = filled(30, ("a", 10), ("b", 10))
    assert ledger.admit("c", 31) == ["c"]
    assert list(ledger) == ["a", "b"]
    assert ledger.admit("a", 31) == ["a"]
    assert list(ledger) == ["b"]
    assert ledger.num_bytes == 10


def test_pinned_nodes_stay():
    ledger = filled(30, ("a", 10), ("b", 10), ("c", 10))
    ledger.pin("a", ttl_s=60)
    assert ledger.admit("d", 10) == ["b"]
    assert not ledger.can_fit("e", 21)
    assert ledger.admit("e", 21) == ["e"]
    assert set(ledger) == {"a", "c", "d"}
    ledger.unpin("a")
    assert ledger.admit("e", 21) == ["a", "c", "d"]


def test_a_pinned_node_makes_room_for_its_own_new_version():
    ledger = filled(30, ("a", 20), ("b", 10))
    ledger.pin("a", ttl_s=60)
    assert ledger.can_fit("a", 30)
    assert ledger.admit("a", 30) == ["b"]
    assert not ledger.can_fit("b", 1)


def test_a_pin_ends_with_its_last_holder_or_its_time():
    clock = Clock()
    ledger = EvictionLedger(10, clock)
    ledger.pin("a", ttl_s=60)  # before it is there
    ledger.pin("a", ttl_s=10)
    assert ledger.admit("a", 10) == []
    ledger.unpin("a")
    clock.now += 20
    assert ledger.admit("b", 10) == ["b"]
    ledger.unpin("a")
    ledger.unpin("a")
    assert ledger.admit("b", 10) == ["a"]
    ledger.pin("b", ttl_s=60)
    clock.now += 59
    assert ledger.admit("c", 10) == ["c"]
    clock.now += 1
    assert ledger.admit("c", 10) == ["b"]


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="-1"):
        EvictionLedger(-1)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "admit", "touch", "discard", "pin", "unpin", "wait"]),
        st.integers(0, 9),
        st.integers(0, 60),
    ),
    max_size=60,
)


@given(max_bytes=st.integers(0, 100), operations=OPERATIONS)
def test_the_budget_holds_and_nothing_leaves_unsaid(max_bytes, operations):
    clock = Clock()
    ledger = EvictionLedger(max_bytes, clock)
    sizes: dict[str, int] = {}
    pinned_until: dict[str, float] = {}
    for operation, number, amount in operations:
        node_id = str(number)
        if operation == "admit":
            gone = ledger.admit(node_id, amount)
            sizes[node_id] = amount
            for gone_id in gone:
                del sizes[gone_id]
                assert gone_id == node_id or pinned_until.get(gone_id, 0) <= clock.now
        elif operation == "touch":
            ledger.touch(node_id)
        elif operation == "discard":
            ledger.discard(node_id)
            sizes.pop(node_id, None)
        elif operation == "pin" and pinned_until.get(node_id, 0) <= clock.now:
            ledger.pin(node_id, amount)
            pinned_until[node_id] = clock.now + amount
        elif operation == "unpin":
            ledger.unpin(node_id)
            pinned_until.pop(node_id, None)
        elif operation == "wait":
            clock.now += amount
        assert {n: n in ledger for n in map(str, range(10))} == {
            n: n in sizes for n in map(str, range(10))
        }
        assert ledger.num_bytes == sum(sizes.values()) <= max_bytes
