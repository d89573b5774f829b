"""The eviction policy, without tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.store.eviction import MOST_USES, EvictionLedger

from ..helpers import Clock


def filled(max_bytes: int, *sizes: tuple[str, int]) -> EvictionLedger:
    ledger = EvictionLedger(max_bytes, Clock())
    for node_id, num_bytes in sizes:
        assert ledger.admit(node_id, num_bytes) == []
    return ledger


def test_of_equally_used_ones_the_least_recently_used_goes():
    ledger = filled(40, ("a", 10), ("b", 10), ("c", 20))
    for node_id in "cab":
        ledger.touch(node_id)
    assert ledger.admit("d", 10) == ["c"]
    assert list(ledger) == ["a", "b", "d"]
    assert ledger.num_bytes == 30


def test_what_was_used_more_stays_however_large_and_old_it_is():
    ledger = filled(100, ("owner", 80))
    for number in range(5):
        ledger.touch("owner")
        ledger.admit(f"borrower {number}", 10)
    assert sorted(ledger) == ["borrower 3", "borrower 4", "owner"]
    assert ledger.admit("another", 20) == ["borrower 3", "borrower 4"]


@pytest.mark.parametrize("uses", [2, MOST_USES, 100 * MOST_USES])
def test_what_is_not_used_any_more_goes_after_as_many_turnovers(uses: int):
    ledger = filled(11, ("popular", 1))
    for _ in range(uses - 1):
        ledger.touch("popular")
    passed = 0
    while "popular" in ledger:
        ledger.admit(f"{passed}", 1)
        passed += 1
    assert passed // 10 == min(uses, MOST_USES)


def test_a_new_version_is_no_use():
    ledger = filled(30, ("a", 5), ("b", 10))
    for size in 6, 7, 8:
        ledger.admit("a", size)
    ledger.touch("b")
    assert ledger.admit("c", 15) == ["a"]


def test_no_more_goes_than_must():
    ledger = filled(100, *((f"n{i}", 10) for i in range(10)))
    assert ledger.admit("new", 25) == ["n0", "n1", "n2"]
    assert ledger.num_bytes == 95


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
def test_the_one_of_the_lowest_priority_goes(max_bytes, operations):
    ledger = EvictionLedger(max_bytes, Clock())
    known: dict[str, list[int]] = {}  # size, uses, priority, time
    floor = 0
    for time, (operation, number, amount) in enumerate(operations):
        node_id = str(number)
        if operation == "admit":
            _, uses, *_ = known.pop(node_id, [0, 1])
            expected = [node_id] if amount > max_bytes else []
            while amount <= max_bytes < amount + sum(size for size, *_ in known.values()):
                worst = min(known, key=lambda n: known[n][2:])
                floor = known.pop(worst)[2]
                expected.append(worst)
            assert ledger.admit(node_id, amount) == expected
            if amount <= max_bytes:
                known[node_id] = [amount, uses, floor + uses, time]
        elif operation == "touch":
            ledger.touch(node_id)
            if node_id in known:
                size, uses, *_ = known[node_id]
                uses = min(uses + 1, MOST_USES)
                known[node_id] = [size, uses, floor + uses, time]
        elif operation == "discard":
            ledger.discard(node_id)
            known.pop(node_id, None)
        assert list(ledger) == sorted(known, key=lambda n: known[n][3])


def test_uses_take_no_room():
    ledger = filled(30, ("a", 10), ("b", 10))
    for _ in range(10_000):
        ledger.touch("b")
    assert len(ledger._heap) < 100
    assert ledger.admit("c", 20) == ["a"]


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
