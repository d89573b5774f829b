"""Small files that would cost much: refused, or read no further than they are needed."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, TiffImagePlugin

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities import sound_file
from kvshare_mm.modalities.bounded import BoundedFile, TooManyReads
from kvshare_mm.modalities.picture_bounds import MAX_SCANS
from kvshare_mm.modalities.picture_file import Picture, load_picture
from kvshare_mm.modalities.sound_file import load_sound

from . import hostile
from .media import encoded, picture

WHERE = "messages[0].content[1].image_url"
MAX_PIXELS = 50_000_000


def load(content: bytes) -> Picture:
    return load_picture(content, WHERE, MAX_PIXELS)


def text_chunks(count: int) -> bytes:
    return hostile.png(hostile.chunk(b"tEXt", b"") * count)


# name: (makes the file, what is said of it)
PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans": (lambda: hostile.jpeg_of_scans(MAX_SCANS), "scans"),
    "scans of a large picture": (lambda: hostile.jpeg_of_scans(2_000, 3000, 3000), "scans"),
    "segments": (lambda: hostile.jpeg_of_segments(400_000), "too many parts"),
    "filling": (
        lambda: b"\xff\xd8" + b"\xff" * 2_000_000 + hostile.jpeg()[2:],
        "too many parts",
    ),
    "exif": (lambda: hostile.jpeg_with_exif(hostile.maze(1_000, 200_000)), "bytes of EXIF"),
    "tags": (lambda: hostile.maze(2_000, 200_000), "too many parts"),
    "tiles": (lambda: hostile.tiff(1, tile=60_000), "tiles"),
    "comment": (lambda: hostile.gif(1, hostile.gif_comment(20_000)), "too many parts"),
    "chunks": (lambda: text_chunks(100_000), "too many parts"),
    "icc": (
        lambda: hostile.png(hostile.chunk(b"iCCP", b"a\0\0" + hostile.zeros(900_000)) * 600),
        "too many parts",
    ),
    "text": (
        lambda: hostile.png(hostile.chunk(b"zTXt", b"a\0\0" + hostile.zeros(50 << 20))),
        "too large",
    ),
    "runs": (lambda: hostile.bmp_rle(500, 500), "compressed BMP"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_cost_too_much_are_refused(name: str) -> None:
    make, says = PICTURES[name]
    with pytest.raises(InvalidRequestError, match=says) as caught:
        load(make())
    assert caught.value.field == WHERE
    assert WHERE in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hostile.jpeg_of_scans(20),
        lambda: hostile.jpeg_of_segments(200),
        lambda: hostile.jpeg() + b"\xff\xda\0\2" * 1_000,  # a phone's film behind its picture
        lambda: text_chunks(100),
        lambda: hostile.gif(1, hostile.gif_comment(20)),
        lambda: hostile.png(pixels=hostile.zeros(100 << 20)),
        lambda: encoded(picture(700, 700), "PNG"),
        lambda: encoded(picture(2000, 2000), "TIFF"),
        lambda: encoded(picture(2000, 2000), "TIFF", compression="tiff_lzw"),
        lambda: encoded(picture(900, 900), "GIF"),
        lambda: encoded(picture(900, 900), "JPEG", progressive=True, quality=95),
    ],
)
def test_honest_pictures_are_read(make: Callable[[], bytes]) -> None:
    content = make()
    loaded = load(content)
    assert loaded.notes == ()
    with Image.open(io.BytesIO(content)) as want:
        assert loaded.image.tobytes() == want.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("content", "frames"),
    [
        (hostile.gif(1), None),
        (hostile.gif(7), "7"),
        (hostile.gif(300_000), "several"),
        (hostile.tiff(1), None),
        (hostile.tiff(5_000), "several"),
        (hostile.tiff(2, cycle=True), "several"),
    ],
)
def test_frames_are_not_read_through(
    content: bytes, frames: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.delattr(kind, "n_frames")  # reads them all
    loaded = load(content)
    assert loaded.image.size == (4, 4)
    assert loaded.notes == (() if frames is None else (f"the first of {frames} frames",))


@pytest.mark.parametrize("raises", [True, False])
def test_a_file_can_be_read_only_so_often(raises: bool) -> None:
    file = BoundedFile(bytes(100), raises)
    for _ in range(10_000):
        assert file.read(0) == b""
    assert not file.exhausted
    if raises:
        with pytest.raises(TooManyReads):
            file.read(1)
    else:
        assert file.read(1) == b""
        assert file.readinto(bytearray(1)) == 0
    assert file.exhausted


def test_a_file_can_be_read_only_a_few_times_over() -> None:
    file = BoundedFile(bytes(1 << 20))
    with pytest.raises(TooManyReads):
        for _ in range(40):
            file.seek(0)
            file.read()


def test_sound_in_too_many_parts_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="too many parts") as caught:
        load_sound(hostile.ogg_of_pages(1_000_000), WHERE, 16_000, 30.0)
    assert caught.value.field == WHERE


def test_sound_of_many_channels_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    content = hostile.sound("FLAC", seconds=1, rate=48_000, channels=8)
    assert len(load_sound(content, WHERE, 16_000, 30.0).samples) == 16_000
    monkeypatch.setattr(sound_file, "MAX_VALUES", 300_000)
    with pytest.raises(InvalidRequestError, match="384000 values in all its channels"):
        load_sound(content, WHERE, 16_000, 30.0)
    with pytest.raises(InvalidRequestError, match="values in all its channels"):
        load_sound((np.zeros((8, 48_000), np.float32), 48_000), WHERE, 16_000, 30.0)
