"""Sound: decoded, brought to the model's rate, hashed window by window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.decoding import QUICK_S, Decoder, InProcess
from kvshare_mm.modalities.hashing import Seen, content_digest, row_hashes, settings_digest
from kvshare_mm.modalities.sound_file import FORMATS, Sound, load_sound
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.stream import MediaItem, Modality

_FRAMES_PER_TOKEN = 4  # two convolutions' strides and one pooling


def num_tokens(num_frames: int) -> int:
    """Positions that Qwen2-Audio and Qwen2.5-Omni make of mel frames (100 a second)."""
    return (((num_frames - 1) // 2 + 1) - 2) // 2 + 1


@dataclass(frozen=True, slots=True)
class _Known:
    digest: str
    length: int
    label: str


class AudioAdapter:
    """Parts of type ``input_audio`` and ``audio`` for models with Whisper's feature extractor.

    Two clips are the same if all their samples are, mixed to mono at the model's rate.

    Args:
        extractor: transformers' feature extractor of the model.
        sources: reads files and URLs.
        decoder: of files that were not seen before.
    """

    modality = Modality.AUDIO
    part_types = frozenset({"input_audio", "audio"})

    def __init__(
        self, extractor: Any, sources: MediaSources, decoder: Decoder | None = None
    ) -> None:
        self._extractor = extractor
        self._sources = sources
        self._decoder = decoder or InProcess()
        self._rate = int(extractor.sampling_rate)
        self._max_s = extractor.n_samples / extractor.sampling_rate
        self._settings = settings_digest(extractor)
        self._seen: Seen[_Known] = Seen()

    def read(self, part: Mapping[str, Any], where: str, tenant: str) -> MediaItem:
        source, field = self._source(part, where)
        if isinstance(source, bytes):
            known = self._seen.get(source, tenant)
            if known is not None:
                return self._item(
                    known, source, field, lambda: self._inputs(self._here(source, field).samples)
                )
            sound = self._decoder.sound(source, field, self._rate, self._max_s)
        else:
            sound = self._here(source, field)
        known = self._known(sound, field)
        # One that takes long is decoded again here, not later by the thread that runs the model.
        if isinstance(source, bytes) and sound.cpu_s <= QUICK_S:
            self._seen.put(source, tenant, known)
        return self._item(known, source, field, lambda: self._inputs(sound.samples))

    def _source(self, part: Mapping[str, Any], where: str) -> tuple[bytes | tuple[Any, Any], str]:
        kind = part["type"]
        field = f"{where}.{kind}"
        given = part.get(kind)
        if given is None:
            raise InvalidRequestError(f"{field} is missing", field)
        if kind == "audio":
            if isinstance(given, tuple | list):
                if len(given) != 2:
                    raise InvalidRequestError(f"{field} must be (samples, sampling rate)", field)
                return (given[0], given[1]), field
            return self._sources.read(given, field), field
        if not isinstance(given, Mapping):
            raise InvalidRequestError(f"{field} must be an object of data and format", field)
        if given.get("format") not in FORMATS:
            raise InvalidRequestError(
                f"{field}.format is {given.get('format')!r}; it must be one of "
                f"{', '.join(FORMATS)}",
                field,
            )
        return self._sources.base64(given.get("data"), field), field

    def _here(self, source: bytes | tuple[Any, Any], field: str) -> Sound:
        """Decoded in this process: what was decoded before, or is an array already."""
        return load_sound(source, field, self._rate, self._max_s)

    def _known(self, sound: Sound, field: str) -> _Known:
        hop = int(self._extractor.hop_length)
        length = num_tokens(math.ceil(len(sound.samples) / hop))
        if length < 1:
            raise InvalidRequestError(
                f"{field} is {len(sound.samples) / self._rate:.3f} s long: too short to hear", field
            )
        digest = content_digest(
            self.window_hashes(sound.samples), len(sound.samples), self._settings
        )
        channels = {1: "mono", 2: "stereo"}.get(sound.channels, f"{sound.channels} channels")
        label = f"{len(sound.samples) / self._rate:.2f} s, {sound.rate} Hz {channels}"
        return _Known(digest, length, label)

    def window_hashes(self, samples: np.ndarray) -> np.ndarray:
        """Hash of every window that becomes a token: ``[n]`` -> ``[windows, 32]`` uint8."""
        width = _FRAMES_PER_TOKEN * int(self._extractor.hop_length)
        return row_hashes(np.pad(samples, (0, -len(samples) % width)).reshape(-1, width))

    def _item(
        self, known: _Known, source: bytes | tuple[Any, Any], field: str, inputs: Any
    ) -> MediaItem:
        return MediaItem(
            self.modality,
            known.digest,
            known.length,
            None,
            known.label,
            inputs,
            content=lambda: (self._here(source, field).samples, self._rate),
        )

    def _inputs(self, samples: np.ndarray) -> dict[str, Any]:
        made = self._extractor(
            samples,
            sampling_rate=self._rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {
            "input_features": made["input_features"],
            "feature_attention_mask": made["attention_mask"],
        }
