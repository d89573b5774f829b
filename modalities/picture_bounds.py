"""What a picture may cost, known from its file before it is decoded."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

MAX_SCANS = 64  # of a progressive JPEG; encoders make about ten, and each costs a whole picture
MAX_EXIF_BYTES = 1 << 16  # the most that JPEG can hold in one piece
_MAX_SEGMENTS = 5_000  # of a JPEG
_MAX_CHUNKS = 500  # of a PNG, beside its pixels

_PNG = b"\x89PNG\r\n\x1a\n"
# In a scan's data, 0xFF stands before 0x00 and restart markers only; another byte ends the scan.
_SEGMENT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SOS, _EOI = 0xDA, 0xD9
_NO_LENGTH = frozenset({0x01, 0xD8})


def refused(content: bytes) -> str | None:
    """Why a file is not opened, in words; None if it may be."""
    if content.startswith(b"\xff\xd8"):
        return _refused_jpeg(content)
    if content.startswith(_PNG) and _num_chunks(content) > _MAX_CHUNKS:
        return "is made of too many parts"
    return None


def refused_open(image: Image.Image, max_pixels: int) -> str | None:
    """Why an opened picture is not decoded, in words; None if it may be."""
    if any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
        # Pillow decodes it pixel by pixel in Python.
        return "is a compressed BMP, which is not read; send it as PNG"
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        width, height = (tags.get(tag, 1) for tag in (322, 323))  # of a tile
        if not all(isinstance(n, int) for n in (width, height)) or width * height > max_pixels:
            return f"is made of tiles of more than {max_pixels / 1e6:g} million pixels"
    return None


def _refused_jpeg(content: bytes) -> str | None:
    """Walks its parts up to its end; what lies behind (previews, a film) is another file."""
    at = scans = exif = 0
    for _ in range(_MAX_SEGMENTS):
        found = _SEGMENT.search(content, at)
        if found is None:
            return None  # torn, as the decoder will say
        at, marker = found.end(), content[found.end() - 1]
        if marker == _EOI:
            return None
        if marker in _NO_LENGTH:
            continue
        size = int.from_bytes(content[at : at + 2], "big")
        if marker == _SOS:
            scans += 1
            if scans > MAX_SCANS:
                return f"has more than {MAX_SCANS} scans, which are decoded one after the other"
        elif content.startswith(b"Exif\0\0", at + 2):
            exif += size
            if exif > 2 * MAX_EXIF_BYTES:
                return f"has more than {MAX_EXIF_BYTES} bytes of EXIF"
        at += size
    return "is made of too many parts"


def _num_chunks(content: bytes) -> int:
    """Chunks of a PNG that do not hold pixels of its first frame, up to the second."""
    at, found = len(_PNG), 0
    while found <= _MAX_CHUNKS and at < len(content):
        kind = content[at + 4 : at + 8]
        if kind in (b"fdAT", b"IEND"):
            return found
        found += kind != b"IDAT"
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    return found


def frames(image: Image.Image, content: bytes) -> int | None:
    """Frames of an opened picture; None: several, which are not counted.

    Pillow counts those of GIF and TIFF by reading through all of them.
    """
    if image.format == "MPO":  # a camera's: the others are previews
        return 1
    if image.format == "GIF":
        return _gif_frames(content, image.tile[0][2])  # type: ignore[attr-defined]
    if image.format == "TIFF":
        return None if image.is_animated else 1  # type: ignore[attr-defined]
    return int(getattr(image, "n_frames", 1))


def _gif_frames(content: bytes, at: int) -> int | None:
    """Frames from the first one's data at `at` on, as far as a few thousand blocks tell."""
    found = 1
    steps = iter(range(10_000 + len(content) // 128))
    try:
        for _ in steps:
            if size := content[at]:  # one block of this frame's data, or of an extension
                at += 1 + size
                continue
            kind = content[at + 1]
            if kind == 0x21:  # an extension
                at += 3
            elif kind == 0x2C:  # an image
                found += 1
                flags = content[at + 10]
                at += 12 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            else:
                return found
    except IndexError:  # torn; Pillow shows what is there
        return found
    return None if found > 1 else 1
