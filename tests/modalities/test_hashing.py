"""Hashes of rows, and the memory of files."""

from __future__ import annotations

import numpy as np
import xxhash
from PIL import Image

from kvshare_mm.modalities.audio import AudioAdapter
from kvshare_mm.modalities.hashing import Seen, content_digest, row_hashes
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.stream import MediaItem, Modality, media_stream

from ..collisions import SECRET, twins
from .media import RATE, encoded, recorded

LOUD = 0.9


def test_rows_are_hashed_one_by_one() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, 3, 7), dtype=np.uint8)
    hashes = row_hashes(rows)
    assert hashes.shape == (5, 32) and hashes.dtype == np.uint8
    for row, one in zip(rows, hashes, strict=True):
        assert np.array_equal(row_hashes(row[None])[0], one)
    assert len(np.unique(hashes, axis=0)) == 5
    assert not (row_hashes(rows[:, ::-1]) == hashes).all(axis=1).any()
    assert np.array_equal(row_hashes(rows[::2]), hashes[::2])  # a view with gaps


# -- strings made so that an unseeded xxh3 takes them for the same ----------------------------


def pixels(patches: list[bytes], columns: int) -> Image.Image:
    """The picture whose merged patches, two by two of 14 pixels a side, hold these bytes."""
    grid = np.frombuffer(b"".join(patches), np.uint8).reshape(-1, columns, 2, 2, 3, 14, 14)
    return Image.fromarray(grid.transpose(0, 2, 5, 1, 3, 6, 4).reshape(-1, 28 * columns, 3))


def assert_apart(one: MediaItem, other: MediaItem) -> None:
    assert one.digest != other.digest
    assert one.content_hash != other.content_hash
    streams = [media_stream([5], [item], {item.modality: 5}, False) for item in (one, other)]
    assert not np.intersect1d(*(stream.align_keys for stream in streams)).size


def test_pictures_made_to_collide_are_two(images: ImageAdapter) -> None:
    rng = np.random.default_rng(0)
    dark, bright = bytes(4), b"\xff" * 4
    pairs = [twins(rng.bytes(28 * 28 * 3), lambda _: True, dark, bright) for _ in range(16)]
    for a, b in pairs:
        assert xxhash.xxh3_64_digest(a) == xxhash.xxh3_64_digest(b)
    made = [pixels([pair[k] for pair in pairs], 4) for k in (0, 1)]
    assert (np.asarray(made[0]) != np.asarray(made[1])).mean() > 0.4
    one, other = (
        images.read({"type": "image", "image": encoded(picture)}, "p", "") for picture in made
    )
    assert one.length == other.length == 16
    assert_apart(one, other)


def test_clips_made_to_collide_are_two(sounds: AudioAdapter) -> None:
    def sample(half: bytes) -> bool:
        return bool(abs(np.frombuffer(half, np.float32)[0]) <= 1)

    loud, quiet = (np.float32(x).tobytes() for x in (LOUD, -LOUD))
    a, b = twins(bytes(640 * 4), sample, loud, quiet)
    assert xxhash.xxh3_64_digest(a) == xxhash.xxh3_64_digest(b)
    clips = [np.tile(np.frombuffer(window, np.float32), 20) for window in (a, b)]
    assert (clips[0] != clips[1]).mean() > 0.05
    one, other = (
        sounds.read({"type": "audio", "audio": recorded(clip, RATE, subtype="FLOAT")}, "p", "")
        for clip in clips
    )
    assert one.modality is Modality.AUDIO
    assert_apart(one, other)


def test_files_made_to_collide_are_two() -> None:
    # What tells tenants apart may stand before the content: these collide behind a NUL, too.
    a, b = twins(bytes(2000), lambda half: half != SECRET[:4], b"\0abc", b"\0xyz")
    assert xxhash.xxh3_128_digest(a) == xxhash.xxh3_128_digest(b)
    assert a[0] == b[0] == 0
    for one, other in ((a, b), (a[1:], b[1:])):
        seen: Seen[int] = Seen()
        seen.put(one, "", 1)
        assert seen.get(one, "") == 1
        assert seen.get(other, "") is None


def test_facts_and_order_count() -> None:
    hashes = np.arange(6, dtype=np.uint8).reshape(3, 2)
    digests = [
        content_digest(hashes, 1, 2),
        content_digest(hashes, 2, 1),
        content_digest(hashes, 12),
        content_digest(hashes[::-1].copy(), 1, 2),
    ]
    assert len(set(digests)) == 4
    assert all(len(d) == 64 for d in digests)


def test_the_least_recently_seen_is_forgotten() -> None:
    seen: Seen[int] = Seen(capacity=2)
    seen.put(b"a", "", 1)
    seen.put(b"b", "", 2)
    assert seen.get(b"a", "") == 1
    seen.put(b"c", "", 3)
    assert [seen.get(x, "") for x in (b"a", b"b", b"c")] == [1, None, 3]


def test_tenants_do_not_see_each_other() -> None:
    seen: Seen[int] = Seen()
    seen.put(b"a", "one", 1)
    assert seen.get(b"a", "two") is None
    assert seen.get(b"\0a", "") is None
    seen.put(b"one\0a", "shop", 2)
    assert seen.get(b"a", "shop\0one") is None
