"""Streams and their alignment keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.stream import Modality, Segment, SegmentStream, media_keys, text_stream

hashes = st.integers(0, 2**64 - 1)


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=50))
def test_the_keys_of_text_are_its_token_ids(ids):
    stream = text_stream(ids)
    assert stream.token_ids.dtype == np.int64
    assert stream.keys.dtype == np.uint64
    assert stream.token_ids.tolist() == stream.keys.tolist() == ids
    assert stream.segments == (Segment(Modality.TEXT, 0, len(ids)),)
    assert len(stream) == len(ids)


def test_text_may_come_as_an_array():
    assert text_stream(np.array([3, 1, 2], dtype=np.int32)).keys.tolist() == [3, 1, 2]


def test_a_text_stream_without_tokens_is_refused():
    with pytest.raises(ValueError, match="empty"):
        text_stream([])


def test_a_negative_token_id_is_refused():
    # Its key would have the top bit set and could be taken for a picture's.
    with pytest.raises(ValueError, match="negative"):
        text_stream([5, -1])


def test_the_arrays_of_a_stream_are_not_the_callers():
    ids = np.array([1, 2, 3])
    stream = text_stream(ids)
    ids[0] = 9
    assert stream.token_ids.tolist() == stream.keys.tolist() == [1, 2, 3]


@given(hashes, st.integers(0, 200))
def test_media_keys_never_meet_a_token_id(content_hash, length):
    keys = media_keys(content_hash, length)
    assert keys.dtype == np.uint64
    assert keys.shape == (length,)
    assert (keys >= np.uint64(2**63)).all()


@given(hashes, hashes, st.integers(1, 64), st.integers(1, 64))
def test_media_keys_tell_content_and_offset_apart(a, b, a_len, b_len):
    one, other = media_keys(a, a_len), media_keys(b, b_len)
    assert len(np.unique(one)) == a_len
    if a == b:
        n = min(a_len, b_len)
        assert np.array_equal(one[:n], other[:n])
    else:
        assert not np.intersect1d(one, other).size


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (4, 2), (-1, 2)])
def test_a_segment_has_a_length_and_a_place(start, end):
    with pytest.raises(ValueError, match="empty or negative"):
        Segment(Modality.TEXT, start, end)


def _segments(*bounds: tuple[int, int]) -> tuple[Segment, ...]:
    return tuple(Segment(Modality.IMAGE, a, b, content_hash=1) for a, b in bounds)


@pytest.mark.parametrize(
    "segments",
    [
        (),
        _segments((0, 3)),
        _segments((0, 5)),
        _segments((1, 4)),
        _segments((0, 1), (2, 4)),
        _segments((0, 3), (2, 4)),
        _segments((2, 4), (0, 2)),
    ],
)
def test_segments_must_tile_the_stream(segments):
    ids = np.arange(4)
    with pytest.raises(ValueError, match="tile"):
        SegmentStream(ids, ids.astype(np.uint64), segments)


def test_segments_that_tile_are_taken():
    ids = np.arange(4)
    keys = np.concatenate((ids[:2].astype(np.uint64), media_keys(7, 2)))
    segments = (Segment(Modality.TEXT, 0, 2), Segment(Modality.IMAGE, 2, 4, content_hash=7))
    assert len(SegmentStream(ids, keys, segments)) == 4


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        (np.arange(3), np.arange(4, dtype=np.uint64)),
        (np.zeros((3, 1), np.int64), np.zeros((3, 1), np.uint64)),
    ],
)
def test_ids_and_keys_must_be_vectors_of_one_length(ids, keys):
    with pytest.raises(ValueError, match="one length"):
        SegmentStream(ids, keys, _segments((0, 3)))
