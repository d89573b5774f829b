"""Pictures as people send them: turned upright, flattened to RGB, or refused with the reason."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.bounded import BoundedFile, TooManyReads
from kvshare_mm.modalities.picture_bounds import MAX_EXIF_BYTES, frames, refused, refused_open

# Not every format that Pillow knows: EPS runs Ghostscript, others are old and hardly tested.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_BAND_PIXELS = 1 << 18
MAX_ASPECT = 200  # of transformers' own resize
_EXIF = ("exif", "Raw profile type exif")
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    ZeroDivisionError,
    TooManyReads,
)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture in RGB, upright.

    Attributes:
        notes: what was done to it that its sender may not expect.
        cpu_s: seconds that decoding took.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()
    cpu_s: float = 0.0


def load_picture(source: bytes | Image.Image, where: str, max_pixels: int) -> Picture:
    """Decode a picture.

    EXIF orientation is applied, transparency is put on white, the first frame of an animation is
    taken, 16-bit and other modes become 8-bit RGB. What would take unreasonably long is refused
    before it is decoded: see `kvshare_mm.modalities.picture_bounds`.

    Args:
        source: a file's content, or a picture that is open already.
        where: the part, for errors.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        InvalidRequestError: no picture, a damaged, an empty or a too large one.
    """
    started = time.thread_time()
    content = source if isinstance(source, bytes) else None
    image = _opened(source, where) if isinstance(source, bytes) else source
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidRequestError(f"{where} is a picture of no pixels ({width}x{height})", where)
    if width * height > max_pixels:
        raise InvalidRequestError(
            f"{where} is {width}x{height} pixels; at most {max_pixels / 1e6:g} million are read",
            where,
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequestError(
            f"{where} is {width}x{height} pixels: more than {MAX_ASPECT} times as long as wide",
            where,
        )
    notes: list[str] = []
    try:
        if content is None:
            shown = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        else:
            if (reason := refused_open(image, max_pixels)) is not None:
                raise InvalidRequestError(f"{where} {reason}", where)
            shown = frames(image, content)
        if shown != 1:
            if content is None:
                image.seek(0)
            notes.append(f"the first of {shown or 'several'} frames")
        image.load()
    except InvalidRequestError:
        raise
    except _DAMAGED as error:
        raise InvalidRequestError(f"{where} is a damaged picture: {_why(error)}", where) from error
    image = _upright(image, notes, in_place=content is not None)
    try:
        rgb = _rgb(image, where, notes)
        return Picture(rgb, tuple(notes), time.thread_time() - started)
    except InvalidRequestError:
        raise
    except _DAMAGED as error:
        raise InvalidRequestError(
            f"{where} cannot be turned into RGB: {_why(error)}", where
        ) from error


def _why(error: BaseException) -> str:
    return "there is not enough memory for it" if isinstance(error, MemoryError) else str(error)


def _opened(content: bytes, where: str) -> Image.Image:
    if (reason := refused(content)) is not None:
        raise InvalidRequestError(f"{where} {reason}", where)
    Image.init()
    built = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build
    try:
        return Image.open(BoundedFile(content), formats=built)
    except Image.DecompressionBombError as error:
        raise InvalidRequestError(f"{where} is too large a picture: {error}", where) from error
    except UnidentifiedImageError as error:
        known = ", ".join(built).lower()
        raise InvalidRequestError(
            f"{where} is no picture that can be read ({known}); it begins with {content[:8]!r}",
            where,
        ) from error
    except _DAMAGED as error:
        raise InvalidRequestError(f"{where} is a damaged picture: {error}", where) from error


def _upright(image: Image.Image, notes: list[str], in_place: bool) -> Image.Image:
    try:
        # Each of its entries may name all of it.
        if max(len(image.info.get(key) or b"") for key in _EXIF) > 2 * MAX_EXIF_BYTES:
            raise ValueError("too much of it")
        if not in_place:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)  # without a copy
        return image
    except Exception:  # of whatever the broken block makes Pillow do
        notes.append("its orientation could not be read")
        return image


def _rgb(image: Image.Image, where: str, notes: list[str]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, where)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image, notes)
    return image.convert("RGB")


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    """Piece by piece: at once, it would take five times a picture's memory."""
    opaque = True
    made = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        opaque &= band.getchannel("A").getextrema() == (255, 255)
        white = Image.new("RGBA", band.size, "white")
        made.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    if not opaque:
        notes.append("transparent parts on white")
    return made


def _eight_bits(image: Image.Image, where: str) -> Image.Image:
    """Grey values of 16 bits, or floats of 0..1, as 8 bits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all() or low < 0 or high > 65535:
        raise InvalidRequestError(
            f"{where} has values from {low:g} to {high:g}: neither 8-bit, 16-bit nor 0..1", where
        )
    if image.mode == "F" and high <= 1:
        return Image.fromarray(np.rint(255 * values).astype(np.uint8))
    if high > 255 or image.mode.startswith("I;16"):
        return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    return Image.fromarray(values.astype(np.uint8))
