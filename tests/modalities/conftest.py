"""Adapters with the settings of small models."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2VLImageProcessor, WhisperFeatureExtractor
from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

from kvshare_mm.modalities.audio import AudioAdapter
from kvshare_mm.modalities.base import Adapters
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.modalities.video import VideoAdapter

MAX_PIXELS = 1_000_000


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_processor() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=224 * 224)


@pytest.fixture(scope="session")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16)


@pytest.fixture
def images(image_processor: Qwen2VLImageProcessor) -> ImageAdapter:
    return ImageAdapter(image_processor, MediaSources(), MAX_PIXELS)


@pytest.fixture
def sounds(extractor: WhisperFeatureExtractor) -> AudioAdapter:
    return AudioAdapter(extractor, MediaSources())


@pytest.fixture(scope="session")
def video_processor() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(min_pixels=56 * 56, max_pixels=224 * 224)


@pytest.fixture
def videos(video_processor: Qwen2VLVideoProcessor) -> VideoAdapter:
    return VideoAdapter(video_processor, MediaSources(), MAX_PIXELS, tokens_per_second=2)


@pytest.fixture
def adapters(images: ImageAdapter, sounds: AudioAdapter) -> Adapters:
    return Adapters([images, sounds])
