"""Sound as people send it: decoded, mixed to mono, resampled, or refused with the reason."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.bounded import BoundedFile

FORMATS = ("wav", "mp3", "flac", "ogg")
_CONTAINERS = {"WAV", "WAVEX", "RF64", "MP3", "MPEG", "FLAC", "OGG"}
_RATES = range(1_000, 768_001)
_MAX_CHANNELS = 32
MAX_VALUES = 50_000_000  # of all channels: 200 MB as floats
_OGG, _OGG_PAGE = b"OggS", 256  # encoders' pages have 4 KiB; junk is searched page by page
_LOUDEST = 10.0  # floats beyond are integers that were not scaled


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A clip in mono.

    Attributes:
        samples: ``[num_samples]`` float32 at the rate that was asked for.
        rate: samples a second as it was sent.
        channels: as it was sent.
        cpu_s: seconds that decoding took.
    """

    samples: np.ndarray
    rate: int
    channels: int
    cpu_s: float = 0.0


def load_sound(source: bytes | tuple[Any, Any], where: str, rate: int, max_s: float) -> Sound:
    """Decode a clip.

    Args:
        source: a file's content, or (samples, samples a second).
        where: the part, for errors.
        rate: samples a second of the result.
        max_s: a longer clip is refused before it is decoded, as is one of more than
            50 million values in all its channels, or a file made of unreasonably many parts.

    Raises:
        InvalidRequestError: no sound, a damaged, an empty or a too long one.
    """
    started = time.thread_time()
    if isinstance(source, bytes):
        samples, own_rate = _decoded(source, where, max_s)
    else:
        samples, own_rate = _given(source, where)
    if not len(samples):
        raise InvalidRequestError(f"{where} is a clip of 0 s", where)
    _check_length(len(samples), own_rate, where, max_s)
    _check_values(samples.size, where)
    if not np.isfinite(samples).all():
        raise InvalidRequestError(f"{where} holds samples that are no finite numbers", where)
    if np.abs(samples).max() > _LOUDEST:
        raise InvalidRequestError(
            f"{where} holds floats of up to {np.abs(samples).max():g}; they should lie in -1..1",
            where,
        )
    mono = samples.T.mean(axis=0)
    if own_rate != rate:
        mono = _resampled(mono, own_rate, rate)
    made = np.ascontiguousarray(mono, dtype=np.float32)
    return Sound(made, own_rate, samples.shape[1], time.thread_time() - started)


def _resampled(mono: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """As `librosa.resample` with ``soxr_hq``, without the seconds that its import takes."""
    import soxr

    length = math.ceil(len(mono) * (rate / own_rate))
    made = soxr.resample(mono, own_rate, rate, quality="soxr_hq")[:length]
    return np.pad(made, (0, length - len(made)))


def _decoded(content: bytes, where: str, max_s: float) -> tuple[np.ndarray, int]:
    """Samples ``[n, channels]`` float32 and their rate."""
    import soundfile

    if content.startswith(_OGG) and content.count(_OGG) > 1_000 + len(content) // _OGG_PAGE:
        raise InvalidRequestError(f"{where} is made of too many parts", where)
    # It calls back from C, where exceptions are lost: the end of reading looks like the file's.
    bounded = BoundedFile(content, raises=False)
    try:
        file = soundfile.SoundFile(bounded)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise InvalidRequestError(
            f"{where} is no sound that can be read ({', '.join(FORMATS)}); it begins with "
            f"{content[:8]!r}: {getattr(error, 'error_string', error)}",
            where,
        ) from error
    with file:
        if bounded.exhausted:
            raise InvalidRequestError(f"{where} is made of too many parts", where)
        if file.format not in _CONTAINERS:
            raise InvalidRequestError(
                f"{where} is {file.format}; only {', '.join(FORMATS)} are read", where
            )
        _check_shape(file.samplerate, file.channels, where)
        # What the header says may be wrong in both directions; no more is read than is allowed.
        _check_length(file.frames, file.samplerate, where, max_s)
        _check_values(file.frames * file.channels, where)
        try:
            limit = min(int(max_s * file.samplerate), MAX_VALUES // file.channels) + 1
            samples = file.read(frames=limit, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
            raise InvalidRequestError(f"{where} is damaged sound: {error}", where) from error
        if bounded.exhausted:
            raise InvalidRequestError(f"{where} is made of too many parts", where)
        if len(samples) < min(file.frames, limit):
            raise InvalidRequestError(
                f"{where} is truncated: {len(samples)} of {file.frames} samples are there", where
            )
        return samples, file.samplerate


def _given(source: tuple[Any, Any], where: str) -> tuple[np.ndarray, int]:
    """Samples ``[n, channels]`` float32 and their rate, from an array."""
    given, rate = source
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer):
        raise InvalidRequestError(f"{where}: the sampling rate must be a whole number", where)
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise InvalidRequestError(f"{where} is no array of samples: {error}", where) from error
    if array.ndim not in (1, 2) or array.dtype.kind not in "iuf":
        raise InvalidRequestError(
            f"{where} must hold samples [n] or [channels, n], not {array.dtype} "
            f"of shape {array.shape}",
            where,
        )
    if array.ndim == 1:
        array = array[:, None]
    elif array.shape[0] < array.shape[1]:
        array = array.T
    _check_shape(int(rate), array.shape[1], where)
    if array.dtype.kind == "f":
        return array.astype(np.float32), int(rate)
    info = np.iinfo(array.dtype)
    middle = 0 if array.dtype.kind == "i" else (info.max + 1) // 2
    scale = float(info.max + 1 - middle)
    return ((array.astype(np.float64) - middle) / scale).astype(np.float32), int(rate)


def _check_shape(rate: int, channels: int, where: str) -> None:
    if rate not in _RATES:
        raise InvalidRequestError(
            f"{where} has {rate} samples a second; {_RATES[0]} to {_RATES[-1]} are read", where
        )
    if not 1 <= channels <= _MAX_CHANNELS:
        raise InvalidRequestError(
            f"{where} has {channels} channels; 1 to {_MAX_CHANNELS} are read", where
        )


def _check_values(num_values: int, where: str) -> None:
    if num_values > MAX_VALUES:
        raise InvalidRequestError(
            f"{where} has {num_values} values in all its channels; at most {MAX_VALUES} are read",
            where,
        )


def _check_length(num_samples: int, rate: int, where: str, max_s: float) -> None:
    if num_samples > max_s * rate:
        raise InvalidRequestError(
            f"{where} is {num_samples / rate:.1f} s long; this model hears {max_s:g} s at most",
            where,
        )
