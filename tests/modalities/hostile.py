"""Small files that cost a decoder much, made here."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
import soundfile
from PIL import Image


def jpeg(width: int = 64, height: int = 64, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height), 128).save(out, "JPEG", **options)
    return out.getvalue()


def jpeg_of_scans(count: int, width: int = 64, height: int = 64) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = jpeg(width, height, progressive=True, quality=50)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def jpeg_of_segments(count: int) -> bytes:
    data = jpeg()
    return data[:2] + b"\xff\xe5\0\2" * count + data[2:]


def jpeg_with_exif(exif: bytes) -> bytes:
    """In as many segments as it takes; Pillow joins them."""
    data = jpeg()
    pieces = [exif[i : i + 65_000] for i in range(0, len(exif), 65_000)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in pieces
    )
    return data[:2] + segments + data[2:]


def maze(entries: int, size: int) -> bytes:
    """TIFF's structure whose entries each name all of it."""
    head = b"II*\0" + struct.pack("<IH", 8, entries)
    body = b"".join(struct.pack("<HHII", 1000 + i, 7, size, 0) for i in range(entries))
    return (head + body).ljust(size, b"\0")


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(extra: bytes = b"", pixels: bytes | None = None, width: int = 8, height: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * height * (1 + 3 * width)) if pixels is None else pixels
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


@cache
def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def gif(frames: int, comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), 9).save(out, "GIF")
    at = out.getvalue().index(b",\0\0\0\0\4\0\4\0")
    head, frame = out.getvalue()[:at], out.getvalue()[at:-1]
    return head + comment + frame * frames + b";"


def gif_comment(blocks: int) -> bytes:
    return b"\x21\xfe" + (b"\xff" + b"a" * 255) * blocks + b"\0"


_TAGS = [
    (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1),
    (262, 3, 1, 1), (273, 4, 1, 8), (278, 3, 1, 4), (279, 4, 1, 16),
]  # fmt: skip


def tiff(directories: int, cycle: bool = False, tile: int | None = None) -> bytes:
    tags = _TAGS if tile is None else [*_TAGS, (322, 4, 1, tile), (323, 4, 1, tile)]
    size = 2 + 12 * len(tags) + 4
    out = [b"II*\0" + struct.pack("<I", 24) + bytes(16)]
    for i in range(directories):
        after = 24 + (i + 1) * size if i < directories - 1 else 24 * cycle
        entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        out.append(struct.pack("<H", len(tags)) + entries + struct.pack("<I", after))
    return b"".join(out)


def bmp_rle(width: int, height: int) -> bytes:
    head = b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return head + bytes(1024) + b"\1\0\0\0" * height + b"\0\1"


def wav(data: bytes, extra: bytes = b"", rate: int = 16_000, channels: int = 1) -> bytes:
    block = channels * 2
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block, block, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + extra
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def sound(format: str, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> bytes:
    out = io.BytesIO()
    samples = np.zeros((int(seconds * rate), channels), np.float32)
    soundfile.write(out, samples, rate, format=format)
    return out.getvalue()


def flac_of_blocks(count: int) -> bytes:
    """Empty metadata blocks between the header and what was behind it."""
    data = sound("FLAC")
    return data[:42] + b"\x01\0\0\0" * count + data[42:]


def ogg_of_pages(count: int) -> bytes:
    return sound("OGG") + b"OggS" * count
