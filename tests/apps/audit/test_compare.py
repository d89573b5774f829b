"""Words, numbers and names that differ between two answers."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.audit.compare import compared, marked, small_words


def outcome(
    full: str, other: str, cut: tuple[bool, bool] = (False, False), small: str = ""
) -> tuple[Any, ...]:
    found = compared({"text": full, "cut": cut[0]}, {"text": other, "cut": cut[1]},
                     small_words([small]))  # fmt: skip
    return found["outcome"], found["numbers"], found["names"]


def test_the_differing_words_are_marked() -> None:
    left, right = marked("The urea is 5.1 today.", "The urea is 7.4, today.")
    assert left == [("The urea is", False), (" 5.1", True), (" today.", False)]
    assert right == [("The urea is", False), (" 7.4,", True), (" today.", False)]


@given(st.text("ab \n", max_size=60), st.text("ab \n", max_size=60))
def test_pieces_are_the_answer_and_what_is_not_marked_is_in_both(a: str, b: str) -> None:
    left, right = marked(a, b)
    assert "".join(text for text, _ in left) == (a if a.strip() else "")
    assert "".join(text for text, _ in right) == (b if b.strip() else "")
    common = [" ".join(t for t, differs in side if not differs).split() for side in (left, right)]
    assert common[0] == common[1]


def test_a_long_answer_is_cut_into_two() -> None:
    same = "word " * 3_000
    left, _ = marked(same + "x", same + "y")
    assert [differs for _, differs in left] == [False, True]


def test_numbers() -> None:
    full, other = "on 3.5.2024 it was 5, or 40%.", "on 3.5.2024 it was 6, or 40%."
    assert outcome(full, other) == ("changed", [["5"], ["6"]], None)
    assert outcome("it was 5.", "5 it was") == ("changed", None, None)


def test_names() -> None:
    full, other = "it is in Oslo, says Anna.", "it is in Rome, says anna."
    assert outcome(full, other) == ("changed", None, [["Oslo"], ["Rome"]])
    assert outcome("What a day", "The day", small="the what") == ("changed", None, None)


def test_what_stands_behind_the_end_of_a_cut_answer_is_no_changed_fact() -> None:
    full, other = "the sodium is 141 and potassium 4", "the sodium is now 141 and potassium 4.2 g"
    assert outcome(full, other, (True, True)) == ("changed", None, None)
    assert outcome(full, other, (False, True)) == ("changed", [["4"], ["4.2"]], None)
    assert outcome("it is 14", "it is 141 in Oslo", (True, False)) == ("cut", None, None)
    # What both say stays a changed fact.
    assert outcome("it is 14 g", "it is 17 g or 18", (True, True))[1] == [["14"], ["17"]]


@given(st.text("ab1 ", min_size=1, max_size=40), st.integers(0, 39))
def test_an_answer_cut_anywhere_has_no_changed_facts(text: str, at: int) -> None:
    for pair, cut in (((text, text[:at]), (False, True)), ((text[:at], text), (True, False))):
        found, numbers, names = outcome(*pair, cut)
        assert found in ("same", "cut") and numbers is names is None
