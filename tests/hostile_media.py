"""Files that claim to be pictures or sound and are cut, flipped, lying, or something else."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import soundfile
from PIL import Image, features

_CUTS = (0.02, 0.2, 0.5, 0.8, 0.97)
_FLIPS = 6
_LARGE = (0xFFFFFFFF, 0x7FFFFFFF, 0xFFFF, 0)


def _picture(kind: str, **options: object) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), (i, 0, 255 - i)) for i in range(20)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _sound(kind: str, subtype: str | None = None, channels: int = 1, rate: int = 16_000) -> bytes:
    t = np.arange(rate // 4) / rate
    wave = np.stack([0.3 * np.sin(2 * np.pi * 440 * t)] * channels, 1).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def good_pictures() -> dict[str, bytes]:
    """One of each format."""
    found = {
        "png": _picture("PNG"),
        "jpeg": _picture("JPEG"),
        "progressive": _picture("JPEG", progressive=True),
        "webp": _picture("WEBP"),
        "lossless": _picture("WEBP", lossless=True),
        "gif": _picture("GIF"),
        "bmp": _picture("BMP"),
        "tiff": _picture("TIFF"),
        "packed tiff": _picture("TIFF", compression="tiff_lzw"),
        "frames of gif": _animated("GIF"),
        "frames of tiff": _animated("TIFF"),
        "frames of webp": _animated("WEBP"),
        "frames of png": _animated("PNG"),
    }
    if features.check("avif"):
        found["avif"] = _picture("AVIF")
    return found


def good_sounds() -> dict[str, bytes]:
    """One of each format."""
    return {
        "wav": _sound("WAV", "PCM_16"),
        "float wav": _sound("WAV", "FLOAT"),
        "law": _sound("WAV", "ULAW"),
        "adpcm": _sound("WAV", "IMA_ADPCM"),
        "rf64": _sound("RF64", "PCM_16"),
        "flac": _sound("FLAC"),
        "stereo flac": _sound("FLAC", channels=2, rate=48_000),
        "ogg": _sound("OGG", "VORBIS"),
        "mp3": _sound("MP3"),
    }


def _worse(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Variants of a good file that are not."""
    for share in _CUTS:
        yield f"{name} cut at {share}", content[: int(len(content) * share)]
    rng = random.Random(name)
    for i in range(_FLIPS):
        flipped = bytearray(content)
        # Headers first: what comes behind is mostly noise.
        end = 64 if i % 2 else len(content)
        for _ in range(1 + 4 * i):
            flipped[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
        yield f"{name} flipped {i}", bytes(flipped)
    yield f"{name} behind noise", rng.randbytes(100) + content
    yield f"{name} before noise", content + rng.randbytes(1000)
    yield f"{name} twice", content + content
    yield f"{name} of zeros", content[:16] + bytes(len(content))
    yield f"{name} within", content[: len(content) // 2] + content + content[len(content) // 2 :]


def _chunk(kind: bytes, content: bytes, check: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if check is None else check
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def _png(
    width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b""
) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = _chunk(b"IDAT", data or zlib.compress(b"")) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def _tiff(entries: list[tuple[int, int, int, int]], following: int = 0, times: int = 1) -> bytes:
    size = 2 + 12 * len(entries) + 4
    out, at = [b"II*\0" + struct.pack("<I", 8)], 8
    for i in range(times):
        out.append(struct.pack("<H", len(entries)))
        out += [struct.pack("<HHII", *entry) for entry in entries]
        at += size
        out.append(struct.pack("<I", at if i < times - 1 else following))
    return b"".join(out)


def _wav(
    rate: int = 16_000,
    channels: int = 1,
    bits: int = 16,
    kind: int = 1,
    data: bytes = bytes(800),
    says: int | None = None,
) -> bytes:
    align = max(1, channels * bits // 8) & 0xFFFF
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    length = len(data) if says is None else says
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", length) + data
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def _noise() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(0)
    for size in (1, 2, 3, 8, 100, 10_000):
        yield f"{size} bytes of noise", rng.randbytes(size)
        yield f"{size} zeros", bytes(size)
    magic = {
        "PNG": b"\x89PNG\r\n\x1a\n",
        "JPEG": b"\xff\xd8\xff\xe0",
        "GIF": b"GIF89a",
        "BMP": b"BM",
        "TIFF": b"II*\0",
        "BigTIFF": b"MM\0+",
        "WEBP": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "VP8X": b"RIFF\x64\0\0\0WEBPVP8X",
        "AVIF": b"\0\0\0\x1cftypavif",
        "HEIC": b"\0\0\0\x1cftypheic",
        "JXL": b"\xff\x0a",
        "JP2": b"\0\0\0\x0cjP  \r\n\x87\n",
        "ICO": b"\0\0\1\0\1\0",
        "PSD": b"8BPS\0\1",
        "WAV": b"RIFF\xff\xff\xff\xffWAVEfmt ",
        "RF64": b"RF64\xff\xff\xff\xffWAVEds64",
        "FLAC": b"fLaC\0\0\0\x22",
        "OGG": b"OggS\0\2",
        "ID3": b"ID3\4\0\0\x7f\x7f\x7f\x7f",
        "MP3": b"\xff\xfb\x90\x64",
        "AIFF": b"FORM\0\0\0\x20AIFF",
        "AU": b".snd\0\0\0\x18",
        "CAF": b"caff\0\1\0\0",
        "W64": b"riff\x2e\x91\xcf\x11",
        "MP4": b"\0\0\0\x18ftypmp42",
        "Matroska": b"\x1aE\xdf\xa3",
    }
    for name, first in magic.items():
        yield f"{name} and noise", first + rng.randbytes(500)
        yield f"{name} alone", first
    yield "text", b"no picture, no sound"
    yield "path", b"/etc/passwd"
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    yield "HTML", b"<html><img src='file:///etc/passwd'>"
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n"
    yield "PDF", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>"
    yield "XPM", b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c red", "a"};'
    yield "playlist", b"#EXTM3U\nfile:///etc/passwd\n"
    yield "zip", b"PK\3\4" + bytes(100)
    yield "ELF", b"\x7fELF" + bytes(100)
    yield (
        "MVG",
        b"push graphic-context\nimage over 0,0 0,0 'https://127.0.0.1/'\npop graphic-context",
    )


def pictures() -> dict[str, bytes]:
    """Hostile pictures by name."""
    made: dict[str, bytes] = {}
    for name, content in good_pictures().items():
        made.update(_worse(name, content))
    made.update(_noise())
    for size in _LARGE:
        made[f"png {size}x{size}"] = _png(size, size)
        made[f"png {size}x1"] = _png(size, 1)
        made[f"gif {size}"] = (
            b"GIF89a" + struct.pack("<HHBBB", size & 0xFFFF, size & 0xFFFF, 0x80, 0, 0) + bytes(20)
        )
        made[f"bmp {size}"] = (
            b"BM"
            + struct.pack("<IHHI", 54, 0, 0, 54)
            + struct.pack(
                "<IiiHHIIiiII", 40, size & 0x7FFFFFFF, -(size & 0x7FFFFFFF), 1, 24, 0, 0, 0, 0, 0, 0
            )
        )
        made[f"tiff {size}"] = _tiff([(256, 4, 1, size), (257, 4, 1, size), (273, 4, 1, 8)])
        made[f"tiff of strips {size}"] = _tiff(
            [(256, 4, 1, 8), (257, 4, 1, 8), (273, 4, size, 8), (279, 4, size, 8)]
        )
        made[f"png chunk of {size}"] = (
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I", size) + b"IHDR" + bytes(30)
        )
    for depth in (0, 1, 3, 16, 255):
        for colour in (0, 2, 3, 5, 255):
            made[f"png of depth {depth} and colour {colour}"] = _png(16, 16, depth, colour)
    bomb = zlib.compress(bytes(64 << 20), 9)
    made |= {
        "png of pixels without end": _png(16, 16, data=bomb),
        "png of text without end": _png(16, 16, extra=_chunk(b"zTXt", b"a\0\0" + bomb)),
        "png of profile without end": _png(16, 16, extra=_chunk(b"iCCP", b"a\0\0" + bomb)),
        "png of animation": _png(16, 16, extra=_chunk(b"acTL", struct.pack(">II", 0xFFFFFFFF, 0))),
        "png of wrong sums": _png(16, 16, extra=_chunk(b"tEXt", b"a\0b", check=0)),
        "png of no palette": _png(16, 16, colour=3, data=zlib.compress(bytes(16 * 17))),
        "png of many chunks": _png(16, 16, extra=_chunk(b"tEXt", b"a\0b") * 5000),
        "tiff in a circle": _tiff([(256, 3, 1, 4), (257, 3, 1, 4)], following=8),
        "tiff of directories": _tiff([(256, 3, 1, 4), (257, 3, 1, 4), (273, 4, 1, 8)], times=3000),
        "tiff of types": _tiff([(256, kind, 1, 4) for kind in range(0, 300)]),
        "tiff that points away": _tiff([(256, 4, 1, 4), (257, 4, 1, 4), (273, 4, 1, 0xFFFFFFF0)]),
        "jpeg of comments": b"\xff\xd8" + b"\xff\xfe\xff\xff" + bytes(65533) + _picture("JPEG")[2:],
        "jpeg of restarts": _picture("JPEG")[:-2] + b"\xff\xd0" * 5000 + b"\xff\xd9",
        "gif of comments": _picture("GIF")[:-1] + b"\x21\xfe" + b"\xff" + b"a" * 255,
        "png and gif": _picture("PNG") + _picture("GIF"),
        "gif and zip": _picture("GIF") + b"PK\3\4" + bytes(50),
        "jpeg and html": _picture("JPEG") + b"<script>alert(1)</script>",
        "sound": _sound("WAV"),
        "narrow": _png(1, 4000),
    }  # fmt: skip
    return made


def sounds() -> dict[str, bytes]:
    """Hostile clips by name."""
    made: dict[str, bytes] = {}
    for name, content in good_sounds().items():
        made.update(_worse(name, content))
    made.update(_noise())
    for size in (0, 1, 999, 768_001, 0x7FFFFFFF, 0xFFFFFFFF):
        made[f"wav of rate {size}"] = _wav(rate=size)
        made[f"wav that says {size}"] = _wav(says=size)
    for channels in (0, 33, 255, 1024, 65535):
        made[f"wav of {channels} channels"] = _wav(channels=channels)
    for bits in (0, 1, 7, 12, 64, 65535):
        made[f"wav of {bits} bits"] = _wav(bits=bits)
    for kind in (0, 2, 3, 6, 17, 49, 80, 85, 0xFFFE, 0xFFFF):
        made[f"wav of kind {kind}"] = _wav(kind=kind)
    endless = struct.pack("<f", float("inf")) * 400
    silent = np.zeros(16_000 * 3600, np.float32)
    file = io.BytesIO()
    soundfile.write(file, silent, 16_000, format="FLAC")
    made |= {
        "wav of infinities": _wav(bits=32, kind=3, data=endless),
        "wav of NaN": _wav(bits=32, kind=3, data=struct.pack("<f", float("nan")) * 400),
        "wav of thunder": _wav(bits=32, kind=3, data=struct.pack("<f", 3e38) * 400),
        "wav of nothing": _wav(data=b""),
        "wav of half a sample": _wav(data=b"x"),
        "an hour of silence": file.getvalue(),
        "wav and flac": _sound("WAV") + _sound("FLAC"),
        "id3 and wav": b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + _sound("WAV"),
        "picture": _picture("PNG"),
    }
    return made
