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
from kvshare_mm.vllm.media import request_stream
from kvshare_mm.vllm.spans import cut, kept_in_the_end, loadable_end, within

from ..collisions import twin_texts

PLACE = 9


def place(offset: int, embeds: str) -> Any:
    """As vLLM describes a place of which some tokens are words (``.``)."""
    at = [offset + i for i, kind in enumerate(embeds) if kind != "."]
    return SimpleNamespace(
        offset=offset,
        length=len(embeds),
        get_num_embeds=lambda: len(at),
        extract_embeds_range=lambda: [(i, i) for i in at],  # vLLM joins neighbours
    )


def feature(offset: int, rows: int = 2, columns: int = 2, name: str = "a", **other: Any) -> Any:
    """As vLLM describes a picture."""
    made = {
        "modality": "image",
        "identifier": name,
        "grid": (rows, columns),
        "mm_position": place(offset, "x" * (rows * columns)),
    }
    return SimpleNamespace(**{**made, **other})


def grids(token_ids: list[int], features: list[Any]) -> np.ndarray:
    """Of a model with M-RoPE."""
    where, end = np.zeros((3, 0), np.int64), 0
    for each in sorted(features, key=lambda f: f.mm_position.offset):
        text = np.arange(each.mm_position.offset - end) + where.max(initial=-1) + 1
        where = np.hstack((where, np.tile(text, (3, 1))))
        rows, columns = np.indices(each.grid).reshape(2, -1)
        picture = np.stack((0 * rows, rows, columns)) + where.max(initial=-1) + 1
        where, end = np.hstack((where, picture)), each.mm_position.offset + len(rows)
    text = np.arange(len(token_ids) - end) + where.max(initial=-1) + 1
    return np.hstack((where, np.tile(text, (3, 1))))


def in_a_row(token_ids: list[int], features: list[Any]) -> None:
    """Of a model without."""


def test_a_picture_has_keys_of_its_own() -> None:
    ids = [5, PLACE, PLACE, PLACE, PLACE, 7]
    a, again, b = (request_stream(ids, [feature(1, name=n)], grids) for n in "aab")
    assert a is not None and again is not None and b is not None
    assert a.align_keys.tolist() == again.align_keys.tolist()
    assert a.align_keys[[0, 5]].tolist() == [5, 7]
    assert (a.align_keys[1:5] >= 1 << 63).all()
    assert len({*a.align_keys.tolist(), *b.align_keys.tolist()}) == 2 + 4 + 4
    assert [(s.start, s.end) for s in a.media] == [(1, 5)]
    assert a.positions is not None
    assert a.positions[:, 5].tolist() == [3, 3, 3]


def test_a_picture_that_moved_has_the_same_keys() -> None:
    one = request_stream([5, *[PLACE] * 4, 7], [feature(1)], grids)
    moved = request_stream([5, 6, 6, *[PLACE] * 4, 7], [feature(3)], grids)
    assert one is not None and moved is not None
    assert one.align_keys[1:5].tolist() == moved.align_keys[3:7].tolist()


def test_a_name_that_is_used_for_another_grid_is_another_picture() -> None:
    """Names may be the sender's own."""
    ids = [PLACE] * 4 + [7]
    square = request_stream(ids, [feature(0)], grids)
    flat = request_stream(ids, [feature(0, 1, 4)], grids)
    assert square is not None and flat is not None
    assert set(square.align_keys.tolist()) & set(flat.align_keys.tolist()) == {7}


@pytest.mark.parametrize("positions", [grids, in_a_row])
@pytest.mark.parametrize("names", [("a", "b"), twin_texts()])
def test_other_names_are_other_media(names: tuple[str, str], positions: Any) -> None:
    ids = [PLACE] * 4 + [7]
    one, other = (request_stream(ids, [feature(0, name=n)], positions) for n in names)
    assert one is not None and other is not None
    assert set(one.align_keys.tolist()) & set(other.align_keys.tolist()) == {7}


def test_the_order_of_features_does_not_matter() -> None:
    ids = [PLACE] * 4 + [5] + [PLACE] * 2
    features = [feature(5, 1, 2, "b"), feature(0, name="a")]
    stream = request_stream(ids, features, grids)
    assert stream is not None
    assert [(s.start, s.end) for s in stream.media] == [(0, 4), (5, 7)]


@pytest.mark.parametrize(
    ("modality", "expected"),
    [("image", Modality.IMAGE), ("video", Modality.IMAGE), ("audio", Modality.AUDIO)],
)
def test_words_around_a_medium_are_text(modality: str, expected: Modality) -> None:
    ids = [5, 20, PLACE, PLACE, 21, PLACE, 22, 7]
    medium = feature(0, modality=modality, mm_position=place(1, ".xx.x."))
    stream = request_stream(ids, [medium], in_a_row)
    assert stream is not None and stream.positions is None
    assert [(s.modality, s.start, s.end) for s in stream.media] == [(expected, 2, 6)]
    assert stream.align_keys[[0, 1, 6, 7]].tolist() == [5, 20, 22, 7]
    assert (stream.align_keys[2:6] >= 1 << 63).all()


def test_what_stands_between_rows_belongs_to_a_picture() -> None:
    """The same name with other ends of rows is laid out otherwise."""
    picture = feature(0, mm_position=place(0, "x.x"))
    made = [request_stream([PLACE, end, PLACE, 7], [picture], in_a_row) for end in (21, 22)]
    assert made[0] is not None and made[1] is not None
    assert set(made[0].align_keys.tolist()) & set(made[1].align_keys.tolist()) == {7}


@pytest.mark.parametrize(
    "features",
    [
        [feature(0, modality="prompt_embeds")],
        [feature(0, mm_position=place(0, "...."))],
        [feature(0), feature(3)],
    ],
)
@pytest.mark.parametrize("positions", [grids, in_a_row])
def test_what_is_not_known_is_declined(features: list[Any], positions: Any) -> None:
    ids = [PLACE] * 7 + [7]
    assert request_stream(ids, [feature(0)], positions) is not None
    assert request_stream(ids, features, positions) is None
    assert request_stream(ids, [feature(0)], None) is None, "media of other models"


def test_a_model_that_cannot_tell_positions_is_declined() -> None:
    def fails(token_ids: list[int], features: list[Any]) -> None:
        raise AssertionError("no data")

    assert request_stream([PLACE] * 4 + [7], [feature(0)], fails) is None
    assert request_stream([5, 7], [], fails) is not None


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
