"""Sound: the same if every sample is, as many positions as the model makes, its inputs exactly."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.audio import AudioAdapter, num_tokens
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.stream import MediaItem

from .media import RATE, recorded, tone


def read(adapter: AudioAdapter, source: Any, tenant: str = "") -> MediaItem:
    return adapter.read({"type": "audio", "audio": source}, "messages[0].content[0]", tenant)


@pytest.mark.parametrize("seconds", [0.03, 0.5, 1.0, 2.37, 30.0])
def test_inputs_are_the_extractors(sounds: AudioAdapter, extractor: Any, seconds: float) -> None:
    samples = tone(seconds)
    want = extractor(samples, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    item = read(sounds, (samples, RATE))
    got = item.inputs()
    assert torch.equal(got["input_features"], want["input_features"])
    assert torch.equal(got["feature_attention_mask"], want["attention_mask"])
    assert item.length == num_tokens(int(want["attention_mask"].sum()))
    assert item.grid is None


@settings(max_examples=60)
@given(st.integers(321, 40_000))
def test_the_number_of_positions_is_the_models(n: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=4, chunk_length=3)
    adapter = AudioAdapter(extractor, MediaSources())
    mask = read(adapter, (np.zeros(n, np.float32), RATE)).inputs()["feature_attention_mask"]
    assert read(adapter, (np.zeros(n, np.float32), RATE)).length == num_tokens(int(mask.sum()))


def test_known_lengths() -> None:
    assert [num_tokens(n) for n in (50, 100, 237)] == [12, 25, 59]


@pytest.mark.parametrize("format", ["FLAC", "WAV"])
def test_the_same_samples_in_another_file_are_the_same(sounds: AudioAdapter, format: str) -> None:
    samples = np.rint(tone() * 32767).astype(np.int16)
    want = read(sounds, (samples, RATE))
    assert read(sounds, recorded(samples, format=format, subtype="PCM_16")).digest == want.digest


def test_one_sample_makes_another_clip(sounds: AudioAdapter) -> None:
    samples = np.rint(tone() * 32767).astype(np.int16)
    other = samples.copy()
    other[7777] ^= 1
    one, two = (read(sounds, recorded(x, subtype="PCM_16")) for x in (samples, other))
    assert one.digest != two.digest
    assert one.length == two.length
    a, b = (sounds.window_hashes(x / np.float32(32768)) for x in (samples, other))
    assert np.flatnonzero((a != b).any(axis=1)).tolist() == [7777 // 640]


def test_silence_at_the_end_is_part_of_a_clip(sounds: AudioAdapter) -> None:
    samples = tone(0.5)
    longer = np.append(samples, np.zeros(100, np.float32))  # in the same window
    assert read(sounds, (samples, RATE)).digest != read(sounds, (longer, RATE)).digest


@pytest.mark.parametrize("format", ["MP3", "OGG", "FLAC", "WAV"])
def test_every_format_is_read(sounds: AudioAdapter, format: str) -> None:
    data = recorded(tone(), format=format)
    part = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": format.lower()},
    }
    item = sounds.read(part, "p", "")
    assert abs(item.length - 25) <= 3  # encoders of mp3 add silence
    assert item.label.endswith("16000 Hz mono")


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(("channels", "called"), [(1, "mono"), (2, "stereo")])
def test_files_are_read_as_librosa_reads_them(
    sounds: AudioAdapter, rate: int, channels: int, called: str
) -> None:
    """To the bit: other samples would be another clip."""
    samples = np.stack([tone(hertz=300 + 400 * i, rate=rate) for i in range(channels)], axis=1)
    data = recorded(samples, rate, subtype="FLOAT")
    want, _ = librosa.load(BytesIO(data), sr=RATE, mono=True)
    item = read(sounds, data)
    assert item.digest == read(sounds, (want, RATE)).digest
    assert item.label == f"1.00 s, {rate} Hz {called}"


def test_channels_may_stand_first_or_last(sounds: AudioAdapter) -> None:
    stereo = np.stack((tone(), tone(hertz=700)))
    digest = read(sounds, (stereo, RATE)).digest
    assert digest == read(sounds, (stereo.T, RATE)).digest
    assert digest == read(sounds, (stereo.mean(0), RATE)).digest


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8])
def test_whole_numbers_are_scaled(sounds: AudioAdapter, dtype: Any) -> None:
    floats = np.round(tone() * 64) / 128
    info = np.iinfo(dtype)
    span = info.max / 2 - info.min / 2 + 0.5
    middle = 0 if info.min < 0 else 128
    item = read(sounds, ((floats * span + middle).astype(dtype), RATE))
    assert item.digest == read(sounds, (floats, RATE)).digest


def test_a_clip_as_long_as_the_model_hears_is_taken(sounds: AudioAdapter) -> None:
    assert read(sounds, (np.zeros(30 * RATE, np.float32), RATE)).length == 750
    with pytest.raises(InvalidRequestError, match="hears 30 s at most"):
        read(sounds, (np.zeros(30 * RATE + 1, np.float32), RATE))


def test_a_file_that_comes_again_is_not_decoded(
    sounds: AudioAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recorded(tone())
    first = read(sounds, data)
    monkeypatch.setattr("kvshare_mm.modalities.audio.load_sound", None)
    assert read(sounds, data).digest == first.digest
