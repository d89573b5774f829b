"""Where an edited word ends."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kvshare_mm.models.loader import load_tokenizer
from kvshare_mm.reuse.catalogue import Catalogue
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.words import joined_positions, joining_tokens


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
