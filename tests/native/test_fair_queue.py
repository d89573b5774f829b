"""Who is next, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.errors import QueueFullError
from kvshare_mm.native.fair_queue import FairQueue

Item = tuple[str, int]


def always(_: object) -> bool:
    return True


def served(queue: FairQueue[Item], cost: dict[str, int], count: int) -> list[Item]:
    """Serve so many, each as dear as its tenant's are."""
    order = []
    for _ in range(count):
        item = queue.next(always)
        if item is None:
            break
        queue.remove(item[0], item)
        queue.charge(item[0], cost[item[0]])
        order.append(item)
    return order


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 100), min_size=2),
    st.integers(1, 60),
)
def test_shares_are_equal_up_to_one_request(cost: dict[str, int], rounds: int) -> None:
    """While all wait, what each was served differs by no more than the dearest request."""
    queue: FairQueue[Item] = FairQueue(100_000)
    for who in cost:
        for i in range(rounds + 1):
            queue.add(who, (who, i))
    got = dict.fromkeys(cost, 0)
    for _ in range(rounds):
        [item] = served(queue, cost, 1)
        got[item[0]] += cost[item[0]]
        assert max(got.values()) - min(got.values()) <= max(cost.values())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["add", "serve", "give up"]))))
def test_any_history_leaves_nobody_behind(history: list[tuple[str, str]]) -> None:
    queue: FairQueue[Item] = FairQueue(8)
    waiting: list[Item] = []
    for number, (who, what) in enumerate(history):
        if what == "add":
            try:
                queue.add(who, (who, number))
            except QueueFullError:
                assert len(waiting) >= 8
            else:
                waiting.append((who, number))
        elif what == "serve":
            for item in served(queue, {"a": 1, "b": 5, "c": 30}, 1):
                assert item == next(w for w in waiting if w[0] == item[0])  # first of its tenant
                waiting.remove(item)
        else:
            mine = [w for w in waiting if w[0] == who]
            if mine:
                queue.remove(who, mine[-1])
                waiting.remove(mine[-1])
        assert len(queue) == len(waiting) <= 16
        assert sorted(queue) == sorted(waiting)
    assert sorted(served(queue, {"a": 1, "b": 5, "c": 30}, 20)) == sorted(waiting)
    # Nothing is kept of tenants that neither wait nor had more than others: their names are many.
    queue.charge("a", 1)
    for i in range(50):
        queue.add(f"t{i}", (f"t{i}", i))
        queue.remove(f"t{i}", (f"t{i}", i))
    assert len(queue._served) <= 5


def test_who_pauses_saves_nothing_up() -> None:
    queue: FairQueue[Item] = FairQueue(1000)
    for i in range(200):
        queue.add("busy", ("busy", i))
    served(queue, {"busy": 10}, 100)
    for i in range(50):
        queue.add("back", ("back", i))
    order = [who for who, _ in served(queue, {"busy": 10, "back": 10}, 40)]
    assert 19 <= order.count("back") <= 21


def test_a_full_queue_has_room_for_who_has_less_than_a_share() -> None:
    queue: FairQueue[Item] = FairQueue(4)
    for i in range(4):
        queue.add("large", ("large", i))
    with pytest.raises(QueueFullError, match="4 requests"):
        queue.add("large", ("large", 4))
    for i in range(2):
        queue.add("small", ("small", i))
    with pytest.raises(QueueFullError):
        queue.add("small", ("small", 2))
    for who in ("third", "fourth", "fifth"):
        try:
            queue.add(who, (who, 0))
        except QueueFullError:
            assert len(queue) == 8  # never more than twice
    assert len(queue) == 8


def test_a_request_that_cannot_start_yet_does_not_hold_up_others() -> None:
    queue: FairQueue[Item] = FairQueue(4)
    for item in (("a", 0), ("a", 1), ("b", 2)):
        queue.add(item[0], item)
    assert queue.next(lambda item: item != ("a", 0)) == ("a", 1)
    assert queue.next(lambda item: item[0] == "b") == ("b", 2)
    assert queue.next(lambda _: False) is None
