"""What the catalogue finds, what it takes for the same, and where an edited word ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kvshare_mm.models.loader import load_tokenizer
from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.reuse.catalogue import Catalogue
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.words import joined_positions, joining_tokens

from .plans import blocks, to_keys

# -- what the catalogue finds, and what it takes for the same --------------------------------------


_EXACT = PlannerOptions(exact_only=True)


def node(name: str, keys: np.ndarray, borrowed: int = 0, owner: str = "") -> Node:
    """One computed in full behind what it borrows from another."""
    pieces = (Piece(owner, 0, 0, borrowed),) if borrowed else ()
    return Node(name, "ns", keys, (Span(borrowed, len(keys)),), pieces, len(keys))


@pytest.mark.parametrize("children", [40, 400])
def test_the_longest_exact_prefix_is_found_behind_newer_ones_that_are_lost(children: int) -> None:
    catalogue = Catalogue(Counter())
    keys = to_keys(blocks(*"ABCD"))
    catalogue.add(node("whole", keys))
    catalogue.add(node("lost", np.concatenate((keys, to_keys([1])))))
    for i in range(children):
        catalogue.add(node(f"child {i}", np.concatenate((keys, to_keys([2, i]))), 80, "lost"))
    target = np.concatenate((keys, to_keys([3, 4])))
    assert catalogue.find(target, "ns", _EXACT).plan.num_exact == 80
    catalogue.remove("lost")
    found = catalogue.find(target, "ns", _EXACT).plan
    assert found.num_exact == 80 and found.donors == ("whole",)


def test_a_twin_is_nowhere_looser() -> None:
    keys = to_keys(blocks(*"ABC"))
    drift = np.zeros(60, np.float16)
    drift[30:40] = 0.5
    stored = replace(node("stored", keys), exact_len=30, drift=drift)
    catalogue = Catalogue(Counter())
    catalogue.add(stored)
    looser = drift.copy()
    looser[50] = np.inf
    elsewhere = np.zeros(60, np.float16)
    elsewhere[50] = np.inf
    for other, known in ((drift, True), (looser, True), (elsewhere, False), (0.9 * drift, False)):
        again = replace(stored, node_id="again", drift=other.astype(np.float16))
        assert (catalogue.twin(again) == "stored") == known
    assert catalogue.twin(node("exact", keys)) is None


def test_what_is_remembered_of_those_that_are_gone_does_not_push_out_those_that_are_here():
    catalogue = Catalogue(Counter())
    for i in range(5000):
        keys = np.arange(1000 * i, 1000 * i + 20, dtype=np.uint64)
        catalogue.add(Node(f"n{i}", "ns", keys, (Span(0, 20),), exact_len=20))
        for node_id in catalogue.beyond(1 << 20):
            catalogue.remove(node_id)
    assert len(catalogue.tree) > 100


# -- where an edited word ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        (" 5766 g", ["5", "7", "6", "6"]),
        (" A7F3-99.", ["7", "F", "3", "-", "9", "9", "."]),
        ("one\n\ttwo, (x)", ["one", "two", "x"]),  # a word at a line's begin is no rest of one,
    ],  # but what separates them ends the word before
)
def test_letters_digits_and_joints_go_on_with_a_word(text: str, joined: list[str]) -> None:
    tokenizer = load_tokenizer("tiny-vl")
    keys = np.asarray(tokenizer(text, add_special_tokens=False).input_ids, np.uint64)
    mask = joined_positions(keys, joining_tokens(tokenizer))
    found = "".join(tokenizer.convert_ids_to_tokens(keys[mask].astype(np.int64).tolist()))
    assert found == "".join(joined)


def test_special_tokens_and_media_end_a_word() -> None:
    tokenizer = load_tokenizer("tiny-vl")
    joining = joining_tokens(tokenizer)
    assert not joining[tokenizer.all_special_ids].any()
    media = np.array([(1 << 63) + 5, len(joining)], np.uint64)
    assert not joined_positions(media, joining).any()


def test_plans_tell_it_where_the_catalogue_knows_it() -> None:
    catalogue = Catalogue(Counter())
    keys = np.array([3, 1, 2, 9], np.uint64)
    assert catalogue.find(keys, "ns", PlannerOptions()).plan.joined is None
    catalogue.joining = np.array([False, True, True, False])
    joined = catalogue.find(keys, "ns", PlannerOptions()).plan.joined
    assert joined is not None and joined.tolist() == [False, True, True, False]
