"""Pictures: the same if they are so to the model, and its processor's inputs exactly."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.stream import MediaItem

from .media import encoded, picture


def read(adapter: ImageAdapter, source: Any, tenant: str = "") -> MediaItem:
    return adapter.read({"type": "image", "image": source}, "messages[0].content[0]", tenant)


@pytest.mark.parametrize("size", [(112, 112), (640, 480), (37, 90), (300, 20), (56, 56), (2, 2)])
def test_inputs_are_the_processors(
    images: ImageAdapter, image_processor: Any, size: tuple[int, int]
) -> None:
    image = picture(*size)
    item = read(images, image)
    want = image_processor(images=[image], return_tensors="pt")
    got = item.inputs()
    assert torch.equal(got["pixel_values"], want["pixel_values"])
    assert got["image_grid_thw"].tolist() == want["image_grid_thw"].tolist()
    _, rows, columns = want["image_grid_thw"][0].tolist()
    assert item.grid == (rows // 2, columns // 2)
    assert item.length == rows * columns // 4


@pytest.mark.parametrize(
    ("format", "options"),
    [("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PNG", {"compress_level": 0})],
)
def test_the_same_pixels_in_another_file_are_the_same(
    images: ImageAdapter, format: str, options: dict[str, Any]
) -> None:
    image = picture()
    assert (
        read(images, encoded(image)).digest
        == read(images, encoded(image, format, **options)).digest
    )
    assert read(images, image).digest == read(images, encoded(image)).digest


def test_one_pixel_makes_another_picture(images: ImageAdapter) -> None:
    one = picture(112, 112)
    other = one.copy()
    r, g, b = one.getpixel((50, 50))  # type: ignore[misc]
    other.putpixel((50, 50), (r ^ 1, g, b))
    first, second = (read(images, encoded(x)) for x in (one, other))
    assert first.digest != second.digest
    assert first.content_hash != second.content_hash


def test_one_pixel_changes_one_patch(images: ImageAdapter, image_processor: Any) -> None:
    one = picture(112, 112)
    other = one.copy()
    other.putpixel((50, 10), (0, 0, 0))
    raw = [
        image_processor(images=[x], do_rescale=False, do_normalize=False, return_tensors="pt")
        for x in (one, other)
    ]
    a, b = (images.patch_hashes(x["pixel_values"].to(torch.uint8)) for x in raw)
    assert a.shape == (16, 32)
    # 28 pixels a merged patch, row by row
    assert np.flatnonzero((a != b).any(axis=1)).tolist() == [1]


def test_the_grid_is_part_of_the_content(images: ImageAdapter) -> None:
    flat = Image.new("RGB", (112, 56), "red")
    tall = Image.new("RGB", (56, 112), "red")
    assert read(images, flat).digest != read(images, tall).digest


def test_the_processors_settings_are_part_of_the_content() -> None:
    image = picture(112, 112)
    digests = {
        read(ImageAdapter(Qwen2VLImageProcessor(**options), MediaSources()), image).digest
        for options in ({}, {"image_mean": [0.5, 0.5, 0.5]}, {"resample": 2})
    }
    assert len(digests) == 3


def test_orientation_is_applied(images: ImageAdapter) -> None:
    image = picture(112, 56)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = read(images, encoded(image, "PNG", exif=exif))
    assert turned.digest == read(images, image.transpose(Image.Transpose.ROTATE_270)).digest
    assert turned.grid == (4, 2)


def test_transparent_is_white(images: ImageAdapter) -> None:
    image = picture(mode="RGBA")
    image.putalpha(0)
    item = read(images, encoded(image))
    assert item.digest == read(images, Image.new("RGB", image.size, "white")).digest
    assert item.notes == ("transparent parts on white",)
    entries = Image.new("P", (56, 56))
    entries.putpalette([255, 0, 0, 0, 255, 0])
    item = read(images, encoded(entries, "PNG", transparency=0))
    assert item.digest == read(images, Image.new("RGB", (56, 56), "white")).digest


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(images: ImageAdapter, mode: str) -> None:
    image = picture(mode=mode)
    assert read(images, image).digest == read(images, image.convert("RGB")).digest


def test_a_cmyk_jpeg_is_read(images: ImageAdapter) -> None:
    data = encoded(picture(mode="CMYK"), "JPEG")
    assert read(images, data).label.startswith("80x60, seen as 84x56")


def test_sixteen_bits_become_eight(images: ImageAdapter) -> None:
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15
    item = read(images, encoded(Image.fromarray(grey)))
    assert item.digest == read(images, Image.fromarray((grey >> 8).astype(np.uint8))).digest


def test_floats_of_0_to_1_are_taken(images: ImageAdapter) -> None:
    grey = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    item = read(images, encoded(Image.fromarray(grey), "TIFF"))
    assert item.digest == read(images, Image.fromarray(np.rint(grey * 255).astype(np.uint8))).digest


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(images: ImageAdapter, format: str) -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    item = read(images, data)
    assert item.digest == read(images, frames[0]).digest
    assert item.notes == ("the first of 3 frames",)


def test_broken_exif_does_not_refuse_a_picture(images: ImageAdapter) -> None:
    image = picture()
    data = encoded(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read(images, data).digest == read(images, image).digest


def test_a_file_that_comes_again_is_not_decoded(
    images: ImageAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture())
    first = read(images, data, "tenant")
    loads = []
    made = images._made
    monkeypatch.setattr(images, "_made", lambda *a: loads.append(a) or made(*a))
    again = read(images, data, "tenant")
    assert (again.digest, again.grid, again.label) == (first.digest, first.grid, first.label)
    assert not loads
    # What the encoder takes is made when it is asked for.
    assert torch.equal(again.inputs()["pixel_values"], first.inputs()["pixel_values"])
    assert len(loads) == 1
    assert read(images, data, "another tenant").digest == first.digest
    assert len(loads) == 2


def test_a_picture_may_be_a_path_or_a_url(images: ImageAdapter, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(picture()))
    url = f"data:image/png;base64,{base64.b64encode(encoded(picture())).decode()}"
    for part in (
        {"type": "image", "image": file},
        {"type": "image_url", "image_url": {"url": str(file)}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": url},
    ):
        assert images.read(part, "p", "").digest == read(images, picture()).digest


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,***", "data:image/png;base64,", "http://127.0.0.1/a.png"]
)
def test_what_a_url_does_not_give_names_the_part(images: ImageAdapter, url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        images.read({"type": "image_url", "image_url": {"url": url}}, "messages[0].content[2]", "")
    assert caught.value.field == "messages[0].content[2].image_url"
