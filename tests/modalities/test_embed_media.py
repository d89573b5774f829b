"""Embeddings of pictures and sound, through open_clip itself and librosa."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.modalities.embed import ImageEmbedder, embed_sound

from .media import RATE, picture, tone


def test_pictures_are_embedded_as_open_clip_does(clip_folder: Path) -> None:
    embedder = ImageEmbedder(str(clip_folder))
    images = [picture(80, 60), picture(33, 90, 1), Image.new("RGB", (1, 1))]
    vectors = embedder.embed(images)
    assert vectors.shape == (3, 24) == (3, embedder.dim)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    with torch.inference_mode():
        want = model.eval().encode_image(preprocess(images[0])[None])[0]
    assert np.allclose(vectors[0], (want / want.norm()).numpy(), atol=1e-5)
    assert vectors[0] @ vectors[1] < 0.9999


@pytest.mark.parametrize("name", ["no-such-thing", "ViT-B-32/no-such-weights", "no-arch/openai"])
def test_a_picture_embedder_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelLoadError, match="picture embedder"):
        ImageEmbedder(name)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot load the picture embedder"):
        ImageEmbedder(str(tmp_path))


def test_sound_is_like_sound_of_its_kind() -> None:
    low, low_too, high = (embed_sound(tone(1.0, hertz), RATE) for hertz in (300, 305, 3000))
    assert low.shape == (128,)
    assert low.dtype == np.float32
    assert np.linalg.norm(low) == pytest.approx(1, abs=1e-5)
    assert low @ low_too > low @ high
    louder = embed_sound(0.5 * tone(1.0, 300), RATE)
    assert low @ louder > 0.99


@pytest.mark.parametrize("samples", [np.zeros(RATE, np.float32), tone(0.03)])
def test_silence_and_short_clips_have_an_embedding(samples: np.ndarray) -> None:
    assert np.isfinite(embed_sound(samples, RATE)).all()
