"""What the desk draws, without a browser."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm import KVShare, SamplingParams
from kvshare_mm.apps.desk import tree_svg, views
from kvshare_mm.apps.desk.session import Cost, Turn
from kvshare_mm.reuse.admin import DonorInfo

_EVIL = "<script>alert('x')</script>"


def donor(name: str, parent: str | None = None, owned: int = 5) -> DonorInfo:
    return DonorInfo(name, "ns", 10, owned, 10, parent, 0, "host", 0.0, 0.0, 0)


def boxes(svg: str) -> dict[str, tuple[float, float]]:
    """Name of each box and where it stands."""
    drawn = ET.fromstring(svg[svg.index("<svg") : svg.index("</svg>") + 6])
    found = {}
    for group in drawn.iter("g"):
        x, y = group.attrib["transform"].removeprefix("translate(").rstrip(")").split()
        name = group.find("text")
        assert name is not None and name.text
        found[name.text] = (float(x), float(y))
    return found


def test_children_stand_under_their_parents() -> None:
    donors = [donor("a"), donor("b", "a"), donor("c", "a"), donor("d", "c"), donor("e", "gone")]
    svg = tree_svg.draw([(d, i) for i, d in enumerate(donors, 1)])
    at = boxes(svg)
    assert set(at) == {"#1", "#2", "#3", "#4", "#5"}
    assert at["#1"][1] == at["#5"][1] < at["#2"][1] == at["#3"][1] < at["#4"][1]
    assert at["#1"][0] == (at["#2"][0] + at["#3"][0]) / 2
    assert svg.count("<path") == 3
    assert "5 stored requests hold 25 tokens; stored whole they would be 50" in svg


@given(st.lists(st.integers(0, 30), max_size=30))
def test_no_two_boxes_overlap(parents: list[int]) -> None:
    names = [f"{i:06d}" for i in range(len(parents))]
    donors = [
        (donor(name, names[parent % i] if i and parent % 3 else None), i + 1)
        for i, (name, parent) in enumerate(zip(names, parents, strict=True))
    ]
    if not donors:
        assert "<svg" not in tree_svg.draw(donors)
        return
    at = sorted(boxes(tree_svg.draw(donors)).values(), key=lambda place: (place[1], place[0]))
    assert len(at) == len(donors)
    for (x1, y1), (x2, y2) in itertools.pairwise(at):
        assert y1 != y2 or x2 - x1 >= tree_svg._WIDTH


def test_a_long_chain_can_be_drawn() -> None:
    chain = [(donor(f"{i:05d}", f"{i - 1:05d}" if i else None), i + 1) for i in range(2000)]
    assert len(boxes(tree_svg.draw(chain))) == 2000


@pytest.fixture
def turn(open_llm: Callable[..., Any]) -> tuple[KVShare, Turn]:
    llm: KVShare = open_llm(repair="none")
    rows = " ".join(f"Value {i} is {i * 37 % 91};" for i in range(12))
    for name in ("Anna", _EVIL):
        output = llm.generate(f"{name} asks. {rows} What?", SamplingParams(max_tokens=3))
        llm.flush()
    return llm, Turn(
        2,
        _EVIL,
        text=f"{_EVIL} 5",
        output=output,
        prefix=Cost(7, 5.0),
        full=Cost(99, 10.0),
        measured=True,
        donors=[(1, "same picture or sound")],
    )


def test_the_report_says_where_the_prompt_came_from(turn: tuple[KVShare, Turn]) -> None:
    llm, shown = turn
    html = views.report(shown, llm.tokenizer)
    assert shown.output is not None
    p = shown.output.provenance
    assert p.reused > 0
    for kind, count in (("exact", p.exact), ("reused", p.reused), ("recomputed", p.recomputed)):
        assert (f'style="flex-grow:{count}" title="{count} {kind}"' in html) == (count > 0)
    assert "request #1 (same picture or sound)" in html
    assert f"{p.similarity:.0%} of the prompt" in html
    assert "10000 ms in full (" in html and "5000 ms with prefix caching (" in html
    for name, cost in (("full recompute", "99"), ("prefix caching", "7"), ("KVShare", "")):
        assert f'<th scope="row">{name}</th>' in html and f"<td>{cost}" in html
    marks = html.count("<mark")
    assert marks >= len(p.spans)


def test_nothing_that_was_written_is_markup(turn: tuple[KVShare, Turn]) -> None:
    llm, shown = turn
    for html in (
        views.report(shown, llm.tokenizer),
        views.answer(shown),
        views.log([shown]),
        views.problem(_EVIL),
        views.about([_EVIL, _EVIL]),
        views.check(replace(shown, alone=f"{_EVIL} 6")),
    ):
        assert "<script" not in html
    assert "&lt;script&gt;" in views.answer(shown)


@pytest.mark.parametrize(
    ("alone", "said"),
    [
        ("It is red. \n", "same answer"),
        ("It is blue.", "It is <mark>blue.</mark>"),
        ("It is", "It <mark>is</mark>"),
        ("Red", "from word 1 on"),
    ],
)
def test_the_badge_says_where_answers_differ(alone: str, said: str) -> None:
    assert said in views.check(Turn(1, "Anna", text="It is red.", alone=alone))
    assert views.check(Turn(1, "Anna", text="It is red.")) == ""


def test_what_is_not_known_yet_is_said(turn: tuple[KVShare, Turn]) -> None:
    llm, shown = turn
    shown.full, shown.measured = None, False
    assert "being measured" in views.report(shown, llm.tokenizer)
    assert "..." in views.log([shown])
    shown.measured = True
    assert "not measured" in views.report(shown, llm.tokenizer)
    assert views.report(None, llm.tokenizer) == ""
    assert "desk-caret" in views.answer(Turn(1, "Anna", text="It"))
