"""Who is written with whom, and who is told of what failed."""

from __future__ import annotations

import sys

import pytest

from kvshare_mm.node import Piece
from kvshare_mm.store import write_queue
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.write_queue import WriteQueue


class Held(dict[str, StoredNode]):
    """What is in RAM, and a queue over it."""

    def __init__(self, make_stored) -> None:
        self._make = make_stored
        self.queue = WriteQueue(self.get)

    def node(self, name: str, *owners: str) -> StoredNode:
        pieces = tuple(Piece(owner, 0, 2 * i, 2) for i, owner in enumerate(owners))
        length = 2 * len(owners) + 2
        self[name] = self._make(name, length, own=((length - 2, length),), pieces=pieces)
        return self[name]

    def write(self, failure: str | None = None) -> str:
        """The first in the queue."""
        stored = self.queue.first()
        if failure is not None:
            self.queue.failed(stored.node.node_id)
        self.queue.done(stored, failure)
        return stored.node.node_id

    def write_all(self) -> list[str]:
        return [self.write() for _ in range(len(self.queue))]


@pytest.fixture
def held(make_stored) -> Held:
    return Held(make_stored)


def test_owners_are_written_before_who_borrows_from_them(held):
    for name, *owners in ("a",), ("b", "a"), ("c", "a", "b"), ("d", "c", "gone"):
        held.node(name, *owners)
        held.queue.add_later(name)
    held.queue.add(held.node("e", "b", "d"))
    written = held.write_all()
    assert sorted(written) == ["a", "b", "c", "d", "e"]
    for name in written:
        owners = [o for o in held[name].node.owners if o in held]
        assert all(written.index(owner) < written.index(name) for owner in owners)


def test_as_many_may_borrow_from_each_other_as_a_long_session_has_turns(held):
    names = [str(i) for i in range(2 * sys.getrecursionlimit())]
    for before, name in zip([None, *names], names, strict=False):
        held.node(name, *([] if before is None else [before]))
        held.queue.add_later(name)
    held.queue.add(held.node("last", names[-1]))
    assert held.write_all() == [*names, "last"]


def test_a_disk_that_fails_is_not_given_all_that_is_older_with_each_node(held):
    for number in range(5):
        name = str(number)
        held.queue.add(held.node(name, *([str(number - 1)] if number else [])))
        assert len(held.queue) == 1
        held.write("io_error")
    held.queue.add(held.node("5", "4"))
    assert list(held.queue) == ["5"]
    assert held.write() == "5"  # it has taken one
    assert held.write_all() == ["0", "1", "2", "3", "4"]


def test_who_waits_for_a_node_waits_for_those_that_come_with_it(held):
    held.queue.add(held.node("a"))
    held.write("io_error")
    held.queue.begin_flush()
    held.queue.add(held.node("b", "a"))
    flush = held.queue.begin_flush()
    held.write()
    assert flush.given == {"a", "b"} and not flush.failed
    held.write("io_error")
    assert flush.failed


def test_all_that_wait_are_told_of_a_failure_or_else_the_next(held):
    held.queue.add(held.node("a"))
    waiting = [held.queue.begin_flush() for _ in range(2)]
    held.queue.add(held.node("b"))
    held.write("io_error")
    assert [flush.failed for flush in waiting] == [True, True]
    waiting.append(held.queue.begin_flush())
    assert not waiting[-1].failed, "it was told already"
    for flush in waiting:
        held.queue.end_flush(flush, True)
    held.queue.add(held.node("c"))
    late = held.queue.begin_flush()
    held.queue.end_flush(late, True)
    assert late.given == {"b", "c"}
    held.write("io_error")
    assert [held.queue.begin_flush().failed for _ in range(2)] == [True, False]


def test_who_waits_for_a_borrower_may_be_written_without(held):
    for name in "ab":
        held.node(name)
        held.queue.add_later(name)
    held.queue.add_waiting("a")
    held.queue.add_waiting("unknown")
    assert held.write_all() == ["a"]
    held.queue.forget(["b"])
    held.queue.add_waiting("b")
    assert not held.queue


def test_who_was_interrupted_leaves_what_failed_to_the_next(held):
    held.queue.add(held.node("a"))
    flush = held.queue.begin_flush()
    held.write("io_error")
    held.queue.end_flush(flush, False)
    assert [held.queue.begin_flush().failed for _ in range(2)] == [True, False]


def test_one_that_is_too_large_does_not_mean_that_the_disk_fails(held):
    held.node("owner")
    held.queue.add_later("owner")
    held.queue.add(held.node("large"))
    held.write("too_large")
    held.queue.add(held.node("a", "owner"))
    assert held.write_all() == ["owner", "a"]
    held.queue.add_waiting("large")
    assert not held.queue, "it will not fit next time"


def test_what_is_asked_for_again_is_not_tried_again_while_the_disk_fails(held):
    held.queue.add(held.node("a"))
    held.write("io_error")
    for _ in range(3):
        held.queue.add_waiting("a")
    assert not held.queue
    held.queue.add(held.node("b"))
    held.write()
    held.queue.add_waiting("a")
    assert held.write_all() == ["a"]


def test_owners_that_come_late_are_waited_for_and_written_first(held):
    """The borrower was queued while the disk failed, and its new version is once it does not."""
    held.queue.add(held.node("owner"))
    held.write("io_error")
    held.queue.add(held.node("other"))
    held.queue.add(held.node("a", "owner"))
    flush = held.queue.begin_flush()
    held.write()
    held.queue.add(held.node("a", "owner"))
    assert flush.given == {"other", "a", "owner"}
    assert held.write_all() == ["owner", "a"]


def test_what_went_with_a_folder_comes_with_the_next_that_borrows_from_it(held):
    held.queue.add(held.node("a"))
    held.write()
    held.queue.add(held.node("x"))
    held.queue.done(held.queue.first(), None, ["a", "unknown"])
    held.queue.add(held.node("b", "a"))
    assert held.write_all() == ["a", "b"]


def test_a_node_that_is_too_large_does_not_mean_that_the_disk_is_well_again(held):
    for name in "ab":
        held.queue.add(held.node(name))
        held.write("io_error")
    held.queue.add(held.node("large"))
    held.write("too_large")
    held.queue.add(held.node("c", "a", "b"))
    assert list(held.queue) == ["c"]


def test_a_disk_that_failed_is_tried_again_where_nothing_new_is_written(held, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(write_queue.time, "monotonic", lambda: now[0])
    held.queue.add(held.node("a"))
    held.write("io_error")
    for seconds in (0, 29):
        now[0] = 100.0 + seconds
        held.queue.add_waiting("a")
        assert not held.queue
    now[0] = 131.0
    held.queue.add_waiting("a")
    assert held.write_all() == ["a"]
