"""What a scheduler makes of pictures: keys, positions, and loads that need no encoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.node import Piece, spans_of
from kvshare_mm.reuse.plan import KeptRun, ReusePlan
from kvshare_mm.stream import Modality, Segment
from kvshare_mm.vllm.media import IN_A_ROW, request_stream
from kvshare_mm.vllm.spans import cut, kept_in_the_end, loadable_end, within

from ..collisions import twin_texts

PLACE = 9


def feature(offset: int, rows: int = 2, columns: int = 2, name: str = "a", **other: Any) -> Any:
    """As vLLM describes a picture; two patches a side become one position."""
    length = rows * columns
    made = {
        "modality": "image",
        "identifier": name,
        "data": {"image_grid_thw": SimpleNamespace(data=[1, 2 * rows, 2 * columns])},
        "mm_position": SimpleNamespace(offset=offset, length=length, get_num_embeds=lambda: length),
    }
    return SimpleNamespace(**{**made, **other})


def test_a_picture_has_keys_of_its_own() -> None:
    ids = [5, PLACE, PLACE, PLACE, PLACE, 7]
    a, again, b = (request_stream(ids, [feature(1, name=n)], 2) for n in "aab")
    assert a is not None and again is not None and b is not None
    assert a.align_keys.tolist() == again.align_keys.tolist()
    assert a.align_keys[[0, 5]].tolist() == [5, 7]
    assert (a.align_keys[1:5] >= 1 << 63).all()
    assert len({*a.align_keys.tolist(), *b.align_keys.tolist()}) == 2 + 4 + 4
    assert [(s.start, s.end) for s in a.media] == [(1, 5)]
    assert a.positions is not None
    assert a.positions[:, 5].tolist() == [3, 3, 3]


def test_a_name_that_is_used_for_another_grid_is_another_picture() -> None:
    """Names may be the sender's own."""
    ids = [PLACE] * 4 + [7]
    square = request_stream(ids, [feature(0)], 2)
    flat = request_stream(ids, [feature(0, 1, 4)], 2)
    assert square is not None and flat is not None
    assert set(square.align_keys.tolist()) & set(flat.align_keys.tolist()) == {7}


def test_names_made_to_collide_are_two_pictures() -> None:
    ids = [PLACE] * 4 + [7]
    one, other = (request_stream(ids, [feature(0, name=name)], 2) for name in twin_texts())
    assert one is not None and other is not None
    assert set(one.align_keys.tolist()) & set(other.align_keys.tolist()) == {7}


def test_the_order_of_features_does_not_matter() -> None:
    ids = [PLACE] * 4 + [5] + [PLACE] * 2
    features = [feature(5, 1, 2, "b"), feature(0, name="a")]
    stream = request_stream(ids, features, 2)
    assert stream is not None
    assert [(s.start, s.end) for s in stream.media] == [(0, 4), (5, 7)]


@pytest.mark.parametrize(
    "other",
    [
        {"modality": "video"},
        {"modality": "audio"},
        {"modality": "prompt_embeds"},
        {"data": None},
        {"data": {"address": 1}},
        {"data": {"image_grid_thw": SimpleNamespace(data=None)}},
        {"data": {"image_grid_thw": SimpleNamespace(data=[2, 4, 4])}},
        {"data": {"image_grid_thw": SimpleNamespace(data=[1, 4, 6])}},
        {"mm_position": SimpleNamespace(offset=0, length=4, get_num_embeds=lambda: 3)},
    ],
)
def test_what_is_not_known_is_declined(other: dict[str, Any]) -> None:
    ids = [PLACE] * 4 + [7]
    assert request_stream(ids, [feature(0)], 2) is not None
    assert request_stream(ids, [feature(0, **other)], 2) is None
    assert request_stream(ids, [feature(0)], None) is None, "media of other models"


# -- models without M-RoPE -----------------------------------------------------------------------


def in_a_row(offset: int, embeds: str, modality: str = "image", name: str = "a") -> Any:
    """As vLLM describes a medium at whose place some tokens are words (``.``)."""
    at = [offset + i for i, kind in enumerate(embeds) if kind != "."]
    runs = [(i, i) for i in at]  # vLLM joins neighbours, which makes no difference
    place = SimpleNamespace(
        offset=offset,
        length=len(embeds),
        get_num_embeds=lambda: len(at),
        extract_embeds_range=lambda: runs,
    )
    return SimpleNamespace(modality=modality, identifier=name, data=None, mm_position=place)


@pytest.mark.parametrize(
    ("modality", "expected"),
    [("image", Modality.IMAGE), ("video", Modality.IMAGE), ("audio", Modality.AUDIO)],
)
def test_media_take_positions_one_behind_the_other(modality: str, expected: Modality) -> None:
    ids = [5, 20, PLACE, PLACE, 21, PLACE, 22, 7]
    stream = request_stream(ids, [in_a_row(1, ".xx.x.", modality)], IN_A_ROW)
    assert stream is not None and stream.positions is None
    assert [(s.modality, s.start, s.end) for s in stream.media] == [(expected, 2, 6)]
    assert stream.align_keys[[0, 1, 6, 7]].tolist() == [5, 20, 22, 7], "words around it are text"
    assert (stream.align_keys[2:6] >= 1 << 63).all()


def test_what_stands_between_rows_belongs_to_a_picture() -> None:
    """The same name with other ends of rows is laid out otherwise."""
    made = [
        request_stream([PLACE, between, PLACE, 7], [in_a_row(0, "x.x")], IN_A_ROW)
        for between in (21, 22)
    ]
    assert made[0] is not None and made[1] is not None
    assert set(made[0].align_keys.tolist()) & set(made[1].align_keys.tolist()) == {7}


@pytest.mark.parametrize("names", [("a", "b"), twin_texts()])
def test_other_names_are_other_media(names: tuple[str, str]) -> None:
    ids = [PLACE, PLACE, 7]
    one, other = (request_stream(ids, [in_a_row(0, "xx", name=n)], IN_A_ROW) for n in names)
    assert one is not None and other is not None
    assert set(one.align_keys.tolist()) & set(other.align_keys.tolist()) == {7}


@pytest.mark.parametrize(
    "features",
    [
        [in_a_row(0, "..")],
        [in_a_row(0, "xx", "prompt_embeds")],
        [in_a_row(0, "xx"), in_a_row(1, "xx")],
    ],
)
def test_places_that_are_not_understood_are_declined(features: list[Any]) -> None:
    assert request_stream([PLACE, PLACE, PLACE, 7], features, IN_A_ROW) is None


def plan_of(kept: list[bool], repair: list[int]) -> ReusePlan:
    """An approximate plan that keeps what is true."""
    edges = np.flatnonzero(np.diff([0, *map(int, kept), 0])).reshape(-1, 2)
    runs = tuple(KeptRun("d", int(a) + 1, int(a), int(b - a), exact=False) for a, b in edges)
    return ReusePlan(len(kept), runs).with_repair(np.array(repair, dtype=np.int64))


def picture(start: int, end: int) -> Segment:
    return Segment(Modality.IMAGE, start, end, 1)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[ReusePlan, list[Segment], int]:
    kept: list[bool] = []
    media = []
    for _ in range(draw(st.integers(1, 6))):
        part = draw(st.lists(st.booleans(), min_size=1, max_size=5))
        if draw(st.booleans()):
            part = draw(st.sampled_from([part, [True] * len(part)]))
            media.append(picture(len(kept), len(kept) + len(part)))
        kept += part
    kept.append(False)
    repair = draw(st.lists(st.integers(0, len(kept) - 1), max_size=3))
    return plan_of(kept, repair), media, draw(st.integers(0, len(kept) - 1))


@given(prompts())
def test_what_a_load_computes_is_text(drawn: tuple[ReusePlan, list[Segment], int]) -> None:
    plan, media, local = drawn
    end = loadable_end(plan, local, media)
    kept = kept_in_the_end(plan)
    assert end == 0 or kept[end - 1]
    if not end:
        return
    computed = np.flatnonzero(~kept[:end])
    computed = computed[computed >= local]
    for segment in media:
        inside = (segment.start <= computed) & (computed < segment.end)
        assert not inside.any()
        assert end <= local or not segment.start < end < segment.end
    assert np.array_equal(kept_in_the_end(cut(plan, end)), kept & (np.arange(len(kept)) < end))
    # No more is given up than must be.
    known = kept | (np.arange(len(kept)) < local)
    new = [s.start for s in media if not known[s.start : s.end].all()]
    assert end == max(e for e in range(1, len(kept)) if kept[e - 1] and e <= min(new, default=e))


@given(prompts())
def test_pieces_are_cut_to_what_is_kept(drawn: tuple[ReusePlan, list[Segment], int]) -> None:
    plan, _, _ = drawn
    kept = kept_in_the_end(plan)
    pieces = [Piece(run.donor, run.donor_start, run.start, run.length) for run in plan.runs]
    cut_to = within(pieces[::-1], spans_of(kept))
    assert sorted(i for p in cut_to for i in range(p.start, p.end)) == np.flatnonzero(kept).tolist()
    assert all(p.owner_start == p.start + 1 for p in cut_to)
