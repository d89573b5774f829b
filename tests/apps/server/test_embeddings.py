"""Embeddings over the network, as OpenAI's client sees them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvshare_mm import KVShare

from .conftest import Running, serving

_MODEL = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def embedding(tiny_folder: Path) -> Iterator[Running]:
    with serving(lambda: KVShare(str(tiny_folder), embedder=_MODEL)) as running:
        yield running


def test_like_texts_have_like_embeddings(embedding: Running) -> None:
    texts = ["The cat sat.", "A cat was sitting.", "Interest rates rose by two points."]
    create = embedding.client().embeddings.create
    # The client asks for base64 when it is not told, and decodes it.
    replies = [
        create(model=_MODEL, input=texts),
        create(model="tiny", input=texts, encoding_format="float", dimensions=384),
    ]
    for reply in replies:
        rows = np.array([each.embedding for each in reply.data])
        assert rows.shape == (3, 384) and [each.index for each in reply.data] == [0, 1, 2]
        assert np.allclose(rows, embedding.llm.embed(texts)[0], atol=1e-5)
        assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.3
        assert reply.model == _MODEL and reply.usage.prompt_tokens == reply.usage.total_tokens > 9
    body = {"input": texts[0], "encoding_format": "base64"}
    [one] = embedding.ask("POST", "/v1/embeddings", json=body).json()["data"]
    row = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
    assert np.allclose(row, embedding.llm.embed(texts[:1])[0][0], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": [1, 2]}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": "a" * 30_000}, 400, "input"),
        ({"input": "a", "dimensions": 5}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_embedded(
    embedding: Running, body: dict[str, object], status: int, param: str
) -> None:
    reply = embedding.ask("POST", "/v1/embeddings", json=body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param


def test_without_an_embedder_it_is_said(shared: Running) -> None:
    reply = shared.ask("POST", "/v1/embeddings", json={"input": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_embedder")
