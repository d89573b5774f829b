"""What was seen before, and what of it is alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.modalities.audio import AudioAdapter
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.seen import SeenMedia, opener
from kvshare_mm.stream import MediaItem

from .media import RATE, encoded, picture, tone

PATIENCE_S = 120  # the first clip has a library compiled, half a minute on a busy machine


class MeanColour:
    """Embeds a picture as its mean colour."""

    def embed(self, images: Any) -> np.ndarray:
        rows = np.stack([np.asarray(image).mean((0, 1)) + 1 for image in images])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def seen() -> Iterator[SeenMedia]:
    seen = SeenMedia(MeanColour, capacity=3)  # type: ignore[arg-type]
    yield seen
    seen.close()


def plain(images: ImageAdapter, colour: str) -> MediaItem:
    from PIL import Image

    part = {"type": "image", "image": encoded(Image.new("RGB", (56, 56), colour))}
    return images.read(part, "p", "")


def test_the_most_alike_come_first(seen: SeenMedia, images: ImageAdapter) -> None:
    red, pink, blue = (plain(images, c) for c in ("#f00", "#f44", "#00f"))
    seen.add([red, blue], "ns")
    assert seen.flush(PATIENCE_S)
    first, second = seen.like(pink, "ns")
    assert (first.content_hash, second.content_hash) == (red.digest[:16], blue.digest[:16])
    assert 1 > first.similarity > second.similarity
    assert first.label == "56x56, seen as 56x56"
    assert [m.similarity for m in seen.like(red, "ns", k=1)] == pytest.approx([1])
    assert seen.counters["embedded"] == 2


def test_what_comes_again_is_counted_and_not_embedded_again(
    seen: SeenMedia, images: ImageAdapter
) -> None:
    red = plain(images, "#f00")
    for _ in range(3):
        seen.add([red], "ns")
    assert seen.flush(PATIENCE_S)
    assert [m.times for m in seen.like(red, "ns")] == [3]
    assert seen.counters["embedded"] == 1


def test_namespaces_and_modalities_are_apart(
    seen: SeenMedia, images: ImageAdapter, sounds: AudioAdapter
) -> None:
    clip = sounds.read({"type": "audio", "audio": (tone(), RATE)}, "p", "")
    red = plain(images, "#f00")
    seen.add([red, clip], "ns")
    assert seen.flush(PATIENCE_S)
    assert [m.modality for m in seen.like(red, "ns")] == ["image"]
    assert [m.modality for m in seen.like(clip, "ns")] == ["audio"]
    assert seen.like(red, "another") == []
    seen.forget("another")
    assert len(seen.like(red, "ns")) == 1
    seen.forget()
    assert seen.like(red, "ns") == []


def test_the_longest_not_seen_is_forgotten(seen: SeenMedia, images: ImageAdapter) -> None:
    items = [plain(images, c) for c in ("#f00", "#0f0", "#00f", "#ff0")]
    seen.add([*items[:3], items[0], items[3]], "ns")
    assert seen.flush(PATIENCE_S)
    known = {m.content_hash for m in seen.like(items[0], "ns")}
    assert known == {items[i].digest[:16] for i in (0, 2, 3)}


def test_an_embedder_that_fails_is_opened_once(
    images: ImageAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def broken(name: str) -> Any:
        opened.append(name)
        raise ModelLoadError("not installed")

    monkeypatch.setattr("kvshare_mm.modalities.seen.ImageEmbedder", broken)
    seen = SeenMedia(opener("some/clip"))
    try:
        red = plain(images, "#f00")
        seen.add([red, red], "ns")
        assert seen.flush(PATIENCE_S)
        assert seen.counters["embed_failed"] == 2
        with pytest.raises(ModelLoadError, match="not installed"):
            seen.like(red, "ns")
        assert opened == ["some/clip"]
    finally:
        seen.close()


def test_the_content_of_an_item_is_what_was_sent(
    images: ImageAdapter, sounds: AudioAdapter
) -> None:
    item = images.read({"type": "image", "image": encoded(picture(80, 60))}, "p", "")
    assert item.content is not None
    assert np.array_equal(np.asarray(item.content()), np.asarray(picture(80, 60)))
    clip = sounds.read({"type": "audio", "audio": (tone(), RATE)}, "p", "")
    assert clip.content is not None
    samples, rate = clip.content()
    assert rate == RATE
    assert np.array_equal(samples, tone())


def test_what_comes_after_the_end_is_dropped_and_nobody_waits_for_it(images: ImageAdapter) -> None:
    seen = SeenMedia(MeanColour)  # type: ignore[arg-type]
    seen.close()
    seen.add([plain(images, "#f00"), plain(images, "#0f0")], "ns")
    assert seen.flush(0)
    assert seen.counters == {"embed_closed": 2}
