"""Streams and their alignment keys."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.stream import (
    MediaItem,
    Modality,
    Segment,
    SegmentStream,
    media_keys,
    media_stream,
    text_stream,
)

digests = st.binary(min_size=16, max_size=32).map(bytes.hex)


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=50))
def test_the_keys_of_text_are_its_token_ids(ids):
    stream = text_stream(ids)
    assert stream.token_ids.dtype == np.int64
    assert stream.align_keys.dtype == np.uint64
    assert stream.token_ids.tolist() == stream.align_keys.tolist() == ids
    assert stream.segments == (Segment(Modality.TEXT, 0, len(ids)),)
    assert len(stream) == len(ids)


def test_the_arrays_of_a_stream_are_not_the_callers():
    ids = np.array([1, 2, 3])
    stream = text_stream(ids)
    ids[0] = 9
    assert stream.token_ids.tolist() == stream.align_keys.tolist() == [1, 2, 3]


@given(digests, digests, st.integers(1, 64), st.integers(1, 64))
def test_media_keys_tell_content_and_offset_apart_and_never_meet_a_token_id(a, b, a_len, b_len):
    one, other = media_keys(a, a_len), media_keys(b, b_len)
    assert one.dtype == np.uint64 and one.shape == (a_len,)
    assert (one >= np.uint64(2**63)).all()
    assert len(np.unique(one)) == a_len
    if a == b:
        n = min(a_len, b_len)
        assert np.array_equal(one[:n], other[:n])
    else:
        assert not np.intersect1d(one, other).size


def test_media_keys_are_of_the_whole_digest():
    one, other = (_item(length=9, digest="ab" * 8 + end * 8) for end in ("cd", "ce"))
    assert one.content_hash == other.content_hash
    a, b = (media_stream([901], [item], PLACES, mrope=False).align_keys for item in (one, other))
    assert not np.intersect1d(a, b).size


# -- media ------------------------------------------------------------------------------------

PLACES = {Modality.IMAGE: 901, Modality.AUDIO: 902, Modality.VIDEO: 903}


def _item(modality=Modality.IMAGE, *, grid=None, length=None, digest="ab" * 16) -> MediaItem:
    length = grid[0] * grid[1] if grid else length
    return MediaItem(modality, digest, length, grid, "label", dict)


def test_placeholders_are_replaced_by_their_items():
    picture, clip = _item(grid=(2, 2)), _item(Modality.AUDIO, length=3, digest="cd" * 16)
    stream = media_stream([5, 902, 6, 901], [picture, clip], PLACES, mrope=False)
    assert stream.token_ids.tolist() == [5, 902, 902, 902, 6, 901, 901, 901, 901]
    assert stream.items == (clip, picture)
    assert [(s.modality, s.start, s.end) for s in stream.segments] == [
        (Modality.TEXT, 0, 1),
        (Modality.AUDIO, 1, 4),
        (Modality.TEXT, 4, 5),
        (Modality.IMAGE, 5, 9),
    ]
    assert stream.media == stream.segments[1::2]
    assert stream.align_keys[1:4].tolist() == media_keys("cd" * 16, 3).tolist()
    assert stream.positions is None
    assert stream.rope_delta == 0


def test_a_stream_without_media_is_text():
    stream = media_stream([1, 2, 3], [], PLACES, mrope=True)
    assert stream.segments == (Segment(Modality.TEXT, 0, 3),)
    assert stream.positions is None
    assert stream.positions_to(5) is None


def test_positions_of_a_picture():
    stream = media_stream([1, 2, 901, 3], [_item(grid=(2, 3))], PLACES, mrope=True)
    assert stream.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert stream.rope_delta == 6 - 9
    assert stream.pictures.tolist() == [False, False, *[True] * 6, False]
    assert stream.positions_to(11)[:, 9:].tolist() == [[6, 7]] * 3
    assert stream.positions_to(9).tolist() == stream.positions.tolist()


def _film(*times) -> MediaItem:
    """A video whose pictures have two columns."""
    first, *others = (
        dataclasses.replace(_item(Modality.VIDEO, grid=(1, 2), digest=f"{i:032x}"), time=time)
        for i, time in enumerate((None, *times))
    )
    return dataclasses.replace(first, behind=tuple(others))


def test_pictures_of_a_video_stand_at_one_placeholder():
    film = _film(0, 9)
    stream = media_stream([1, 903, 2, 901], [_item(grid=(1, 1)), film], PLACES, mrope=True)
    assert stream.token_ids.tolist() == [1, *[903] * 6, 2, 901]
    assert stream.items[:3] == (film, *film.behind)
    assert [(s.modality, s.start, s.end) for s in stream.media] == [
        (Modality.VIDEO, 1, 3),
        (Modality.VIDEO, 3, 5),
        (Modality.VIDEO, 5, 7),
        (Modality.IMAGE, 8, 9),
    ]
    assert stream.align_keys[3:5].tolist() == media_keys(film.behind[0].digest, 2).tolist()
    assert stream.pictures.tolist() == [False, *[True] * 6, False, True]
    assert stream.positions.tolist() == [
        [0, 1, 1, 1, 1, 10, 10, 3, 4],
        [0, 1, 1, 1, 1, 1, 1, 3, 4],
        [0, 1, 2, 1, 2, 1, 2, 3, 4],
    ]


def test_an_answer_follows_the_text_that_it_answers():
    late, end = (media_stream([903, *text], [_film(9)], PLACES, mrope=True) for text in ([2], []))
    assert late.positions[:, -1].tolist() == [2, 2, 2]
    assert late.positions_to(6)[:, -1].tolist() == [3, 3, 3]
    assert end.positions_to(5)[:, -1].tolist() == [10, 10, 10]


def test_sound_alone_needs_no_axes():
    clip = _item(Modality.AUDIO, length=4)
    alone = media_stream([1, 902], [clip], PLACES, mrope=True)
    assert alone.positions is None
    assert alone.pictures is None
    both = media_stream([902, 901], [_item(grid=(1, 2)), clip], PLACES, mrope=True)
    assert both.positions.tolist() == [
        [0, 1, 2, 3, 4, 4],
        [0, 1, 2, 3, 4, 4],
        [0, 1, 2, 3, 4, 5],
    ]


# -- what cannot be -----------------------------------------------------------------------------


def _stream(*bounds, n=4, keys=4, **more) -> SegmentStream:
    """Pictures over `n` ids."""
    segments = tuple(Segment(Modality.IMAGE, a, b, content_hash=1) for a, b in bounds)
    return SegmentStream(np.arange(n), np.arange(keys, dtype=np.uint64), segments, **more)


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (text_stream, [[]], "empty"),
        # Its key would have the top bit set and could be taken for a picture's.
        (text_stream, [[5, -1]], "negative"),
        *(
            (Segment, [Modality.TEXT, *bounds], "empty or negative")
            for bounds in [(0, 0), (3, 3), (4, 2), (-1, 2)]
        ),
        *(
            (_stream, bounds, "tile")
            for bounds in [
                [],
                [(0, 3)],
                [(0, 5)],
                [(1, 4)],
                [(0, 1), (2, 4)],
                [(0, 3), (2, 4)],
                [(2, 4), (0, 2)],
            ]
        ),
        (partial(_stream, n=3), [(0, 3)], "one length"),
        (partial(SegmentStream, segments=()), np.zeros((2, 3, 1), np.int64), "one length"),
        (partial(_stream, positions=np.zeros((3, 5), np.int64)), [(0, 4)], r"\[3, N\]"),
        (MediaItem, [Modality.IMAGE, "ab" * 16, 0, None, "", dict], "positions"),
        (MediaItem, [Modality.IMAGE, "ab" * 16, 5, (2, 3), "", dict], "positions"),
        *(
            (partial(media_stream, mrope=True), [ids, [_item(grid=(1, 1))], PLACES], "places for")
            for ids in ([1, 2], [901, 901], [902])
        ),
    ],
)
def test_what_cannot_be_is_refused(make, arguments, says):
    with pytest.raises(ValueError, match=says):
        make(*arguments)
