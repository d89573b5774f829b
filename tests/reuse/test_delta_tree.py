"""The DELTA tree, case by case."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.reuse.tree import DeltaTree


def test_a_node_of_many_pieces_reads_as_position_by_position():
    rng = np.random.default_rng(0)
    tree = DeltaTree()
    for name, exact_len in (("a", 2000), ("b", 700)):
        keys = np.arange(2000, dtype=np.uint64)
        tree.insert(Node(name, "ns", keys, (Span(0, 2000),), exact_len=exact_len))
    own, pieces = [], []
    source: list[tuple[str, int] | None] = [None] * 2000
    cuts = [0, *np.unique(rng.integers(1, 2000, 900)).tolist(), 2000]
    for start, end in itertools.pairwise(cuts):
        owner = ["n", "a", "b", "gone", None][rng.integers(0, 5)]
        at = start if owner == "n" else int(rng.integers(0, 2000 - (end - start) + 1))
        if owner == "n":
            own.append(Span(start, end))
        elif owner is not None:
            pieces.append(Piece(owner, at, start, end - start))
        if owner in ("n", "a", "b"):
            source[start:end] = [(owner, at + i) for i in range(end - start)]
    tree.insert(Node("n", "ns", keys, tuple(own), tuple(pieces), exact_len=1200))
    for start in (0, 1, 37, 1990, *rng.integers(0, 1900, 50).tolist()):
        length = min(int(rng.integers(1, 100)), 2000 - start)
        read: list[tuple[str, int] | None] = [None] * length
        for piece in tree.resolve("n", start + 5, length, shift=5):
            first = piece.start - 5 - start
            read[first : first + piece.length] = [
                (piece.owner, piece.owner_start + i) for i in range(piece.length)
            ]
        assert read == source[start : start + length]
    exact = {"a": 2000, "b": 700, "n": 1200}
    donor = tree.donor("n")
    assert donor.reusable.tolist() == [s is not None and s[1] < exact[s[0]] for s in source]
    assert donor.readable == source.index(None)


def test_what_an_owner_has_no_longer_is_a_hole():
    """It was deleted here, and less of it taken over again."""
    tree = DeltaTree()
    keys = np.arange(8, dtype=np.uint64)
    tree.insert(Node("b", "ns", keys, (Span(6, 8),), (Piece("a", 0, 0, 2), Piece("a", 3, 2, 4))))
    for own, readable, begins in (
        (Span(0, 8), 8, True),
        (Span(0, 5), 2, True),  # of a piece that is not all there nothing is
        (Span(1, 8), 0, False),
    ):
        tree.insert(Node("a", "ns", keys, (own,), exact_len=8))
        assert tree.donor("b").readable == readable
        assert tree.begins("b") == begins
        pieces = [p for p in tree.resolve("b", 0, 8) if p.owner == "a"]
        assert all(
            own.start <= p.owner_start and p.owner_start + p.length <= own.end for p in pieces
        )
        tree.drop("a")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"own": (Span(0, 3), Span(2, 5))}, "overlap"),
        ({"own": (Span(0, 0),)}, "empty"),
        ({"own": (Span(3, 2),)}, "empty"),
        ({"own": (Span(-1, 2),)}, "overlap"),
        ({"own": (Span(0, 11),)}, "beyond"),
        ({"own": (Span(5, 6), Span(0, 2))}, "ascending"),
        ({"own": (Span(0, 4),), "pieces": (Piece("b", 0, 3, 2),)}, "overlap"),
        ({"own": (), "pieces": (Piece("b", 0, 8, 3),)}, "beyond"),
        ({"own": (), "pieces": (Piece("b", 0, 5, 1), Piece("b", 0, 1, 2))}, "ascending"),
        ({"own": (), "exact_len": 11}, "beyond"),
        ({"own": (), "exact_len": -1}, "beyond"),
    ],
)
def test_a_node_that_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Node("a", "ns", np.zeros(10, np.uint64), **fields)


def test_at_least_one_owner():
    with pytest.raises(ValueError, match="max_owners"):
        DeltaTree(0)
