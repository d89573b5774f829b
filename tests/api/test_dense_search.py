"""Dense search: donors in its index, and what fails there is no request's problem."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_mm import KVShare, ModelLoadError, RequestOutput
from kvshare_mm.index.milvus import MilvusIndex

from .prompts import _DONOR, _PARAMS, _TARGET, OpenLLM, events


class StubEmbedder:
    """Letters counted. Raises for prompts about a yak."""

    dim = 8

    def __init__(self, name: str) -> None:
        if name == "missing":
            raise ModelLoadError("there is no such embedder")
        self.name = name

    def embed(self, texts: list[str]) -> np.ndarray:
        if any("yak" in text for text in texts):
            raise RuntimeError("this embedder fears yaks")
        counts = np.array([[1 + t.count(c) for c in "aeinorst"] for t in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def stub_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare_mm.modalities.embed.TextEmbedder", StubEmbedder)


@pytest.mark.usefixtures("stub_embedder")
def test_milvus_that_cannot_be_reached(
    open_llm: OpenLLM, full: RequestOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = partial(MilvusIndex, retry_after=1000)  # tried again, it would fail, and count, again
    monkeypatch.setattr("kvshare_mm.index.milvus.MilvusIndex", once)
    llm = open_llm(embedder="stub", index_uri="http://127.0.0.1:1", max_num_seqs=1)
    assert llm.generate(_TARGET, _PARAMS).token_ids == full.token_ids
    assert llm.flush()
    assert llm.generate(_DONOR, _PARAMS).provenance.reused > 0
    llm.generate(["The fox.", "The dog.", "The number."], _PARAMS)
    assert llm.flush()
    assert events(llm)["dense_open_failed"] == 1
    assert events(llm)["dense_insert_skipped"] >= 2


@pytest.mark.usefixtures("stub_embedder")
def test_an_embedder_that_is_missing(open_llm: OpenLLM) -> None:
    llm = open_llm(embedder="missing")
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush()
    assert llm.generate(_TARGET, _PARAMS).provenance.reused > 0
    assert events(llm)["dense_open_failed"] == 1


@pytest.mark.usefixtures("stub_embedder")
def test_donors_are_in_the_dense_index_and_back_after_a_restart(
    open_llm: OpenLLM, tmp_path: Path
) -> None:
    options = {"embedder": "stub", "store_dir": tmp_path, "max_num_seqs": 1}

    def dense_ids(llm: KVShare) -> set[str]:
        assert llm._parts.donors is not None
        semantic: Any = llm._parts.donors.reuse.semantic
        ids: set[str] = semantic._opened[0].ids()
        return ids

    llm = open_llm(**options)
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush()
    # A prompt that cannot be embedded is served and stored like the others.
    yak = "The yak jumps over the lazy dog. " * 4
    llm.generate([yak, "The quick brown fox jumps over the lazy dog. " * 4], _PARAMS)
    assert llm.flush()
    donors = llm._parts.donors
    assert donors is not None
    nodes = {node.node_id for node in donors.tree}
    ids = dense_ids(llm)
    assert ids < nodes
    assert (len(nodes), len(ids)) == (3, 2)
    assert events(llm)["dense_insert_failed"] == 1
    namespace = next(iter(donors.tree)).namespace
    assert set(donors.reuse.similar(_TARGET, namespace)) == ids
    assert donors.reuse.similar(yak, namespace) == ()
    assert events(llm)["dense_search_failed"] == 1
    llm.close()

    # The index may be lost: it is filled again from the store.
    shutil.rmtree(next(tmp_path.glob("milvus-*.db")), ignore_errors=True)
    for path in tmp_path.glob("milvus-*.db"):
        os.unlink(path)
    again = open_llm(**options)
    assert again.flush()
    assert dense_ids(again) == ids
