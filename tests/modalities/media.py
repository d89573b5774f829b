"""Pictures and sound for tests, and the bytes of their files."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import soundfile
from PIL import Image

RATE = 16_000


def picture(width: int = 80, height: int = 60, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 150, width)[None, :, None] + np.zeros((height, 1, 3))
    pixels = slope + rng.integers(0, 100, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def film(frames: int, width: int = 112, height: int = 84, first: int = 0) -> list[Image.Image]:
    """So many different pictures, from a `first` on."""
    return [picture(width, height, seed) for seed in range(first, first + frames)]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tone(seconds: float = 1.0, hertz: float = 440, rate: int = RATE) -> np.ndarray:
    """A tone with some noise: ``[n]`` float32."""
    n = int(seconds * rate)
    noise = np.random.default_rng(int(hertz)).normal(0, 0.01, n)
    return (0.3 * np.sin(2 * np.pi * hertz / rate * np.arange(n)) + noise).astype(np.float32)


def recorded(
    samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None
) -> bytes:
    """A sound file of samples ``[n]`` or ``[n, channels]``."""
    buffer = BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()
