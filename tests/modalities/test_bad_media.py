"""Bad media: each is refused with an error that names the part and says what is wrong with it."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.base import Adapters
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.sources import MediaSources

from . import hostile
from .media import RATE, encoded, picture, recorded, tone

WHERE = "messages[1].content[0]"
PNG = encoded(picture())
JPEG = encoded(picture(), "JPEG")
WAV = recorded(tone(), subtype="PCM_16")
_NO_PIXELS = hostile.zeros(0)


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def png(width: int, height: int) -> dict[str, Any]:
    """A header of this size, and no pixels behind it."""
    return image(hostile.png(width=width, height=height, pixels=_NO_PIXELS))


def filled(value: float, dtype: Any) -> dict[str, Any]:
    return image(Image.fromarray(np.full((60, 60), value, dtype)))


def audio(source: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": source}


def input_audio(data: Any, format: Any = "wav") -> dict[str, Any]:
    if isinstance(data, bytes):
        data = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": format}}


def _floats(*values: float) -> bytes:
    samples = np.zeros(8000, np.float32)
    samples[100 : 100 + len(values)] = values
    return recorded(samples, subtype="FLOAT")


# name: (part, the key of the part that the error names, what it says)
BAD: dict[str, tuple[Any, str, str]] = {
    # what is no media at all
    "image missing": ({"type": "image"}, "image", "missing"),
    "image null": (image(None), "image", "missing"),
    "image a number": (image(7), "image", "neither a path nor bytes"),
    "image a list": (image([1, 2]), "image", "neither a path nor bytes"),
    "image an array": (image(np.zeros((8, 8, 3))), "image", "neither a path nor bytes"),
    "image of no name": (image(""), "image", "missing"),
    "image a stream": (image(io.BytesIO(PNG)), "image", "neither a path nor bytes but a BytesIO"),
    "image without bytes": (image(b""), "image", "empty"),
    "url missing": ({"type": "image_url", "image_url": {}}, "image_url", "missing"),
    "url null": (image_url(None), "image_url", "missing"),
    "url empty": (image_url(""), "image_url", "missing"),
    "url a number": (image_url(5), "image_url", "must be a URL"),
    "url a list": ({"type": "image_url", "image_url": ["x"]}, "image_url", "must be a URL"),
    "no such file": (image("/nowhere/at/all.png"), "image", "no file"),
    "url of no such file": (image_url("/nowhere/at/all.png"), "image_url", "no file"),
    "url an array": ({"type": "image_url", "image_url": np.zeros(3)}, "image_url", "be a URL"),
    "a folder": (image("/"), "image", r"0\]\.image: / is no file"),
    "a device": (image("/dev/zero"), "image", "is no file"),
    "a path with NUL": (image("a\0b"), "image", "cannot be read"),
    # what is no picture
    "text": (image(b"Hello, this is no picture at all."), "image", "no picture"),
    "html": (image(b"<!doctype html><html></html>"), "image", "no picture"),
    "svg": (image(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "image", "no picture"),
    "pdf": (image(b"%PDF-1.7 ..."), "image", "no picture"),
    "postscript": (image(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "image", "no picture"),
    "sound": (image(WAV), "image", "no picture"),
    "zeros": (image(bytes(1000)), "image", "no picture"),
    # what is a bad picture
    "png cut at its header": (image(PNG[:20]), "image", "picture"),
    "png cut in its pixels": (image(PNG[: len(PNG) // 2]), "image", "damaged"),
    "jpeg cut in its pixels": (image(JPEG[: len(JPEG) // 2]), "image", "damaged"),
    "png with a wrong checksum": (image(PNG[:50] + b"\0\0\0\0" + PNG[54:]), "image", "damaged"),
    "png of no pixels": (png(0, 0), "image", "picture"),
    "png without its pixels": (png(64, 64), "image", "damaged"),
    "bomb by its header": (png(60_000, 60_000), "image", "large"),
    "large by its header": (png(2_000, 2_000), "image", "at most 1 million"),
    "large when open": (image(Image.new("L", (1001, 1000))), "image", "at most 1 million"),
    "no pixels when open": (image(Image.new("RGB", (0, 5))), "image", "no pixels"),
    "much too long": (image(Image.new("RGB", (1000, 4))), "image", "times as long as wide"),
    "values below zero": (filled(-5, np.int32), "image", "values from -5"),
    "values that are no numbers": (filled(np.nan, np.float32), "image", "values from nan"),
    # what is no sound
    "audio missing": ({"type": "audio"}, "audio", "missing"),
    "audio a number": (audio(3), "audio", "neither a path nor bytes"),
    "audio of three": (audio((tone(), RATE, 1)), "audio", "samples, sampling rate"),
    "audio file missing": (audio("/nowhere/clip.wav"), "audio", "no file"),
    "input_audio missing": ({"type": "input_audio"}, "input_audio", "missing"),
    "input_audio a string": (
        {**input_audio(WAV), "input_audio": "A"},
        "input_audio",
        "object of data",
    ),
    "base64 with wrong letters": (input_audio("****"), "input_audio", "no base64"),
    "base64 cut": (input_audio("QUJDR"), "input_audio", "no base64"),
    "base64 beyond ascii": (input_audio("äöü="), "input_audio", "no base64"),
    "base64 empty": (input_audio(""), "input_audio", "empty"),
    "base64 null": (input_audio(None), "input_audio", "must be base64"),
    "format unknown": (input_audio(WAV, "amr"), "input_audio", "must be one of"),
    "format missing": (input_audio(WAV, None), "input_audio", "must be one of"),
    "text as sound": (input_audio(b"no sound at all, really"), "input_audio", "no sound"),
    "picture as sound": (input_audio(PNG), "input_audio", "no sound"),
    "another container": (audio(recorded(tone(), format="AIFF")), "audio", "AIFF"),
    # what is bad sound
    "wav header alone": (audio(WAV[:30]), "audio", "no sound"),
    "flac cut": (audio(recorded(tone(), format="FLAC")[:9000]), "audio", "is"),
    "0 s": (audio(recorded(np.zeros(0, np.float32))), "audio", "0 s"),
    "0 s as an array": (audio((np.zeros(0, np.float32), RATE)), "audio", "0 s"),
    "3 h": (audio(hostile.wav(bytes(3 * 3600 * 2000), rate=1000)), "audio", "10800.0 s long"),
    "31 s": (audio((np.zeros(31 * RATE, np.int16), RATE)), "audio", "30 s at most"),
    "5 ms": (audio((tone(0.005), RATE)), "audio", "too short"),
    "not a number": (audio(_floats(np.nan)), "audio", "no finite numbers"),
    "infinite": (audio(_floats(np.inf, -np.inf)), "audio", "no finite numbers"),
    "not a number in an array": (audio((np.full(9000, np.nan), RATE)), "audio", "no finite"),
    "floats that are whole numbers": (audio((tone() * 30_000, RATE)), "audio", "should lie in"),
    "complex samples": (audio((np.zeros(9000, complex), RATE)), "audio", "must hold samples"),
    "words for samples": (audio((["a", "b"], RATE)), "audio", "must hold samples"),
    "rows of two lengths": (audio(([[1.0], [1.0, 2.0]], RATE)), "audio", "no array"),
    "three axes": (audio((np.zeros((2, 2, 900)), RATE)), "audio", "must hold samples"),
    "no samples a second": (audio((tone(), 0)), "audio", "samples a second"),
    "minus a rate": (audio((tone(), -16_000)), "audio", "samples a second"),
    "a rate in words": (audio((tone(), "16000")), "audio", "whole number"),
    "a thousand channels": (audio((np.zeros((900, 1000)), RATE)), "audio", "channels"),
    "a rate of billions": (audio(hostile.wav(bytes(64_000), rate=2 * 10**9)), "audio", "samples a"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_media_is_refused_and_the_part_is_named(adapters: Adapters, name: str) -> None:
    part, key, says = BAD[name]
    with pytest.raises(InvalidRequestError, match=says) as caught:
        adapters.read(part, WHERE, "")
    assert caught.value.field == f"{WHERE}.{key}"
    assert str(caught.value).count(f"{WHERE}.{key}") == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "clip.mp4"},
        {"type": "video_url", "video_url": {"url": "https://example.com/clip.mp4"}},
    ],
)
def test_video_is_refused_by_models_that_take_none(
    adapters: Adapters, part: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match="video is not supported") as caught:
        adapters.read(part, WHERE, "")
    assert caught.value.field == WHERE


@pytest.mark.parametrize("part", [{"type": "file"}, {"type": None}, {"type": 3}, {}])
def test_other_parts_are_refused(adapters: Adapters, part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="takes parts of type audio, image, image_url"):
        adapters.read(part, WHERE, "")


def test_a_large_file_is_not_read(image_processor: Any, tmp_path: Path) -> None:
    adapter = ImageAdapter(image_processor, MediaSources(max_bytes=1 << 20))
    file = tmp_path / "large.png"
    with file.open("wb") as out:
        out.truncate(1 << 40)  # a hole: reading it would take all memory
    with pytest.raises(InvalidRequestError, match="more than 1048576 bytes"):
        adapter.read(image(file), WHERE, "")


def test_large_base64_is_not_decoded() -> None:
    sources = MediaSources(max_bytes=300)
    assert sources.base64(base64.b64encode(bytes(300)).decode(), WHERE) == bytes(300)
    with pytest.raises(InvalidRequestError, match="more than 300 bytes"):
        sources.base64("A" * 5000, WHERE)


def test_base64_may_have_line_breaks() -> None:
    text = base64.encodebytes(bytes(200)).decode()
    assert "\n" in text
    assert MediaSources().base64(text, WHERE) == bytes(200)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(adapters: Adapters, tmp_path: Path) -> None:
    file = tmp_path / "secret.png"
    file.write_bytes(PNG)
    file.chmod(0)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        adapters.read(image(file), WHERE, "")


@pytest.mark.parametrize("seed", range(60))
def test_damage_anywhere_gives_a_picture_or_an_error(adapters: Adapters, seed: int) -> None:
    """Whatever Pillow raises on broken bytes, callers see one kind of error."""
    rng = np.random.default_rng(seed)
    formats = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
    data = bytearray(encoded(picture(40, 40), formats[seed % len(formats)]))
    for at in rng.integers(0, min(len(data), 400), 6):
        data[at] = int(rng.integers(0, 256))
    try:
        item = adapters.read(image(bytes(data)), WHERE, "")
    except InvalidRequestError as error:
        assert error.field == f"{WHERE}.image"
    else:
        assert item.length >= 1


@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_gives_sound_or_an_error(adapters: Adapters, seed: int) -> None:
    rng = np.random.default_rng(seed)
    format = ("WAV", "FLAC", "OGG", "MP3")[seed % 4]
    data = bytearray(recorded(tone(0.3), format=format))
    for at in rng.integers(0, min(len(data), 300), 6):
        data[at] = int(rng.integers(0, 256))
    try:
        item = adapters.read(audio(bytes(data)), WHERE, "")
    except InvalidRequestError as error:
        assert error.field == f"{WHERE}.audio"
    else:
        assert item.length >= 1


def test_a_model_without_ears_says_so(images: ImageAdapter) -> None:
    with pytest.raises(InvalidRequestError, match="takes parts of type image, image_url, text"):
        Adapters([images]).read(audio((tone(), RATE)), WHERE, "")
