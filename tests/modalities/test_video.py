"""Video: groups of frames are the same if they are so to the model; what is no video is refused."""

from __future__ import annotations

import base64
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.data_url import MAX_FRAMES
from kvshare_mm.modalities.decode_pool import DecodePool
from kvshare_mm.modalities.decoding import InProcess
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.picture_file import Picture
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.modalities.video import VideoAdapter
from kvshare_mm.stream import MediaItem

from .media import encoded, film, picture

WHERE = "messages[1].content[0]"
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"
HEAD = "data:video/jpeg;base64,"


def read(adapter: VideoAdapter, frames: Any, tenant: str = "", **more: Any) -> list[MediaItem]:
    """The groups of a video."""
    first = adapter.read({"type": "video", "video": frames, **more}, WHERE, tenant)
    return [first, *first.behind]


def url_of(*frames: bytes) -> str:
    return HEAD + ",".join(base64.b64encode(frame).decode() for frame in frames)


@pytest.mark.parametrize("size", [(112, 112), (640, 80), (37, 90), (56, 56), (2, 2)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_inputs_are_the_processors(
    videos: VideoAdapter, video_processor: Any, size: tuple[int, int], count: int
) -> None:
    frames = film(count, *size)
    items = read(videos, frames)
    want = video_processor(videos=[frames], return_tensors="pt")
    got = [item.inputs() for item in items]
    pixels = torch.cat([each["pixel_values_videos"] for each in got])
    assert torch.equal(pixels, want["pixel_values_videos"])
    groups, rows, columns = want["video_grid_thw"][0].tolist()
    assert len(items) == groups == math.ceil(count / 2)
    assert all(each["video_grid_thw"].tolist() == [[1, rows, columns]] for each in got)
    assert {(item.grid, item.length) for item in items} == {
        ((rows // 2, columns // 2), rows * columns // 4)
    }
    assert [item.time is None for item in items] == [True, *[False] * (groups - 1)]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 3), (100, 1), (100, 3)])
def test_a_frame_of_few_lines_is_seen_as_a_picture_of_few_lines(
    videos: VideoAdapter, images: ImageAdapter, size: tuple[int, int]
) -> None:
    """Transformers' own processor takes one or three lines for colours."""
    shown = picture(*size)
    [frame] = read(videos, [shown])
    still = images.read({"type": "image", "image": shown}, WHERE, "")
    assert frame.grid == still.grid
    assert torch.equal(frame.inputs()["pixel_values_videos"], still.inputs()["pixel_values"])


def test_a_group_is_known_by_its_frames_wherever_it_stands(videos: VideoAdapter) -> None:
    frames = film(8)
    whole, later = read(videos, frames), read(videos, frames[2:])
    assert [i.digest for i in later] == [i.digest for i in whole[1:]]
    assert len({i.digest for i in whole}) == 4
    assert [i.label for i in whole][3] == "video 4 of 4, 112x84, seen as 112x84"
    changed = [*frames[:3], picture(112, 84, 99), *frames[4:]]
    other = read(videos, changed)
    assert [a.digest == b.digest for a, b in zip(other, whole, strict=True)] == [
        True,
        False,
        *[True] * 2,
    ]
    swapped = read(videos, [frames[1], frames[0]])
    assert swapped[0].digest != whole[0].digest


def test_an_odd_frame_is_one_that_stands_still(videos: VideoAdapter) -> None:
    frames = film(3)
    assert read(videos, frames)[1].digest == read(videos, [*frames, frames[2]])[1].digest


def test_times_are_those_of_the_speed(video_processor: Any, videos: VideoAdapter) -> None:
    frames = film(8)
    assert [i.time for i in read(videos, frames, fps=1)] == [None, 4, 8, 12]
    assert [i.time for i in read(videos, frames, fps=3.0)] == [None, 1, 2, 4]
    assert [i.time for i in read(videos, frames)] == [None, 0, 0, 0]
    slow, fast = (read(videos, frames, fps=fps)[0].digest for fps in (1, 2))
    assert slow != fast
    untimed = VideoAdapter(video_processor, MediaSources())
    for fps in (1, 30):
        assert [i.time for i in read(untimed, frames, fps=fps)] == [None, 1, 2, 3]
    assert read(untimed, frames, fps=1)[0].digest == read(untimed, frames, fps=30)[0].digest


def test_all_ways_to_send_a_video_are_one(videos: VideoAdapter, tmp_path: Path) -> None:
    frames = film(4)
    files = [encoded(frame, "JPEG", quality=90) for frame in frames]
    for i, content in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    opened = [Image.open(path) for path in paths]
    ways: list[dict[str, Any]] = [
        *({"type": "video", "video": v} for v in (files, paths, opened, tuple(map(str, paths)))),
        {"type": "video_url", "video_url": {"url": url_of(*files)}},
        {"type": "video_url", "video_url": url_of(*files)},
        {"type": "video_url", "video_url": files},  # as the server has taken it apart
    ]
    found = [videos.read(way, WHERE, "") for way in ways]
    assert len({(v.digest, *(g.digest for g in v.behind)) for v in found}) == 1


class Counting(InProcess):
    """Counts what is decoded."""

    def picture(self, content: bytes, where: str, max_pixels: int) -> Picture:
        self.counters["decoded"] += 1
        return super().picture(content, where, max_pixels)


def test_files_that_were_seen_are_not_decoded_again(video_processor: Any) -> None:
    decoder = Counting()
    adapter = VideoAdapter(video_processor, MediaSources(), decoder=decoder)
    files = [encoded(frame) for frame in film(4)]
    first, again = read(adapter, files), read(adapter, files)
    assert decoder.counters["decoded"] == 4
    assert [i.digest for i in first] == [i.digest for i in again]
    for one, other in zip(first, again, strict=True):
        a, b = one.inputs(), other.inputs()
        assert torch.equal(a["pixel_values_videos"], b["pixel_values_videos"])
    read(adapter, files, "another tenant")
    read(adapter, files, fps=2)
    assert decoder.counters["decoded"] == 12


def test_frames_are_decoded_by_the_pool(video_processor: Any) -> None:
    files = [encoded(frame) for frame in film(3)]
    pool = DecodePool(1, 30.0, 1_000_000)
    try:
        adapter = VideoAdapter(video_processor, MediaSources(), decoder=pool)
        found = [item.digest for item in read(adapter, files)]
        assert pool.counters == {"decoded": 3}
        with pytest.raises(InvalidRequestError, match="damaged") as caught:
            read(adapter, [*files, files[0][:300]])
        assert caught.value.field == f"{WHERE}.video[3]"
    finally:
        pool.close()
    here = VideoAdapter(video_processor, MediaSources())
    assert found == [item.digest for item in read(here, files)]


def test_what_people_are_shown_of_a_group_is_its_first_frame(videos: VideoAdapter) -> None:
    frames = film(4)
    shown = [item.content() for item in read(videos, frames) if item.content]
    assert [image.tobytes() for image in shown] == [frame.tobytes() for frame in frames[::2]]


def still(count: int, *size: int) -> list[Image.Image]:
    return [Image.new("RGB", size or (56, 56))] * count


BAD: dict[str, tuple[Any, str, str]] = {
    "missing": (None, "video", "missing"),
    "no frames": ([], "video", "has 0 frames"),
    "too many": (still(MAX_FRAMES + 1), "video", f"1 to {MAX_FRAMES}"),
    "a file": (MP4, "video", "video files are not read: send a list of frames"),
    "a path": ("clip.mp4", "video", "video files are not read"),
    "a number": (7, "video", "is a int"),
    "an array": (np.zeros((2, 56, 56, 3), np.uint8), "video", "is a ndarray"),
    "arrays": ([np.zeros((56, 56, 3), np.uint8)], "video[0]", "neither a path nor bytes"),
    "one that is no frame": ([*still(1), 7], "video[1]", "neither a path nor bytes"),
    "one that is a file": ([*still(1), MP4], "video[1]", "no picture"),
    "one that is broken": ([*still(2), encoded(picture())[:500]], "video[2]", "damaged"),
    "one that is empty": ([b""], "video[0]", "empty"),
    "one of no name": ([*still(1), ""], "video[1]", "video[1] is empty"),
    "one that is nowhere": ([*still(1), "/nowhere.png"], "video[1]", "no file"),
    "of two sizes": ([*still(2), *still(1, 56, 84)], "video[2]", "is 56x84, and the first frame"),
    "a large frame": (still(1, 1001, 1000), "video[0]", "at most 1 million"),
    "too large together": (still(11, 300, 310), "video", "at most 1 million pixels"),
    "small ones that are made larger": (
        still(320, 2, 2),
        "video",
        "2x2, each seen as 3136 pixels; at most 1 million pixels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_video_is_refused_and_the_part_is_named(videos: VideoAdapter, name: str) -> None:
    frames, key, says = BAD[name]
    with pytest.raises(InvalidRequestError) as caught:
        read(videos, frames)
    assert says in str(caught.value)
    assert caught.value.field == f"{WHERE}.{key}"
    assert f"{WHERE}.{key}" in str(caught.value)


@pytest.mark.parametrize(
    "fps",
    [0, -1, 0.001, 10**400, 10**5000, math.nan, math.inf, -math.inf, "2", "2" * 5000, True, [2]],
    ids=itertools.count(),
)
def test_bad_speeds(videos: VideoAdapter, fps: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must be a number from") as caught:
        read(videos, film(2), fps=fps)
    assert len(str(caught.value)) < 200
    assert caught.value.field == f"{WHERE}.fps"


URLS: dict[str, tuple[Any, str]] = {
    "empty": ("", "missing"),
    "null": (None, "missing"),
    "of a file": ("https://example.com/clip.mp4", "video files are not read; send frames"),
    "with a file": ("data:video/mp4;base64,AAAA", "video files are not read; send frames"),
    "a path": ("clip.mp4", "video files are not read; send frames"),
    "no base64": (HEAD + "AAA*", r"video_url\[0\] is no base64"),
    "no base64 behind some": (HEAD + "QUJD,AAA", r"video_url\[1\] is no base64: its end"),
    "beyond ascii": (HEAD + "ä", "ascii"),
    "no frame": (HEAD, r"video_url\[0\] is empty"),
    "no last frame": (HEAD + "QUJD,", r"video_url\[1\] is empty"),
    "a frame that is none": (HEAD + "QUJD", r"video_url\[0\] is no picture"),
    "too many frames": (HEAD + "QUJD," * MAX_FRAMES, f"more than {MAX_FRAMES} frames"),
    "too large": (HEAD + "A" * (1 << 27), "more than 67108864 bytes"),
}


@pytest.mark.parametrize("name", URLS)
def test_bad_urls(videos: VideoAdapter, name: str) -> None:
    url, says = URLS[name]
    with pytest.raises(InvalidRequestError, match=says) as caught:
        videos.read({"type": "video_url", "video_url": {"url": url}}, WHERE, "")
    assert str(caught.value.field).startswith(f"{WHERE}.video_url")
    assert str(caught.value).startswith(str(caught.value.field))


def test_all_frames_together_are_bounded(video_processor: Any) -> None:
    files = [encoded(frame) for frame in film(4)]
    most = sum(map(len, files)) - 1
    assert len(read(VideoAdapter(video_processor, MediaSources(most + 1)), files)) == 2
    for sent in (files, [*files, *files]):
        with pytest.raises(InvalidRequestError, match=f"more than {most} bytes") as caught:
            read(VideoAdapter(video_processor, MediaSources(most)), sent)
        assert caught.value.field == f"{WHERE}.video"


def test_nothing_is_decoded_beyond_what_is_taken(video_processor: Any) -> None:
    decoder = Counting()
    adapter = VideoAdapter(video_processor, MediaSources(), 100_000, decoder)
    with pytest.raises(InvalidRequestError, match="million pixels"):
        read(adapter, [encoded(frame) for frame in film(20)])
    assert decoder.counters["decoded"] == 1
    with pytest.raises(InvalidRequestError, match="first frame"):
        read(adapter, [encoded(f) for f in (*film(1), *film(1, 56, 56), *film(5))])
    assert decoder.counters["decoded"] == 3
