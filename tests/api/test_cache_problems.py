"""Cache problems: requests are served in full, and the problem is counted."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from kvshare_mm import RequestOutput
from kvshare_mm.errors import KVUnavailableError

from .prompts import _DONOR, _PARAMS, _TARGET, OpenLLM, events


@pytest.fixture
def store(open_llm: OpenLLM, tmp_path: Path) -> Path:
    """A store folder that holds `_DONOR`."""
    llm = open_llm(store_dir=tmp_path / "store")
    llm.generate(_DONOR, _PARAMS)
    llm.close()
    return tmp_path / "store"


def node_file(store: Path) -> Path:
    [path] = (store / "kv").iterdir()
    return path


def test_flipped_bytes_in_stored_kv(open_llm: OpenLLM, full: RequestOutput, store: Path) -> None:
    path = node_file(store)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0x40
    path.write_bytes(content)
    llm = open_llm(store_dir=store)
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.fallback == "corrupt"
    assert output.provenance.recomputed == len(output.prompt_token_ids)
    assert output.provenance.donors == ()
    assert events(llm)["read_corrupt"] == 1
    assert events(llm)["forgotten"] == 1
    assert llm.stats()["requests"]["fallback_corrupt"] == 1
    assert llm.flush()
    # The damaged donor is gone, and the request that met it has taken its place.
    assert llm.stats()["donors"]["nodes"] == 1
    again = llm.generate(_TARGET, _PARAMS)
    assert again.provenance.recomputed == 1
    assert again.token_ids == full.token_ids


@pytest.mark.parametrize("damage", ["header", "truncated", "empty", "another format"])
def test_files_that_are_damaged_at_the_start(
    open_llm: OpenLLM, full: RequestOutput, store: Path, damage: str
) -> None:
    path = node_file(store)
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[200] ^= 0x40
    path.write_bytes(
        {"truncated": bytes(content[:-100]), "empty": b"", "another format": b"{}" * 500}.get(
            damage, bytes(content)
        )
    )
    llm = open_llm(store_dir=store)
    assert events(llm) == {"damaged_at_start": 1}
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.declined == "no_donor"


def test_a_full_disk_costs_durability_only(
    open_llm: OpenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: Any, **kwargs: Any) -> int:
        raise KVUnavailableError("io_error", "No space left on device")

    llm = open_llm(store_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("kvshare_mm.store.disk.write_node", no_space)
        llm.generate(_DONOR, _PARAMS)
        assert not llm.flush()
        assert events(llm)["write_io_error"] == 1
        assert llm.generate(_TARGET, _PARAMS).provenance.reused > 0  # from memory
        llm.flush()
    llm.generate("The quick brown fox jumps. " * 9, _PARAMS)  # there is space again
    assert llm.flush()
    llm.close()
    assert events(open_llm(store_dir=tmp_path))["restored"] == 1


@pytest.mark.parametrize(
    ("place", "error", "fallback"),
    [
        ("reuse.catalogue.find", RuntimeError("a bug in an index"), "lookup_error"),
        ("store.get", MemoryError(), "edit_error"),
    ],
    ids=["lookup", "edit"],
)
def test_a_bug_in_the_cache_costs_the_reuse_only(
    open_llm: OpenLLM,
    full: RequestOutput,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
    fallback: str,
) -> None:
    llm = open_llm()
    llm.generate(_DONOR, _PARAMS)
    llm.flush()
    *path, name = place.split(".")
    monkeypatch.setattr(
        attrgetter(".".join(path))(llm._parts.donors), name, Mock(side_effect=error)
    )
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.fallback == fallback
    assert llm.stats()["requests"][f"fallback_{fallback}"] == 1
    if fallback == "lookup_error":  # what a plan was not made for is computed in full
        assert output.provenance.declined == fallback
        assert output.provenance.recomputed == len(output.prompt_token_ids)
        assert events(llm)["lookup_error"] == 1


def test_more_donors_than_memory(open_llm: OpenLLM) -> None:
    llm = open_llm(host_bytes=1 << 20)
    numbers = np.random.default_rng(0).integers(3, 379, (14, 200))
    for ids in numbers.tolist():
        assert len(llm.generate(ids, _PARAMS).token_ids) == 6
    assert llm.flush()
    donors = llm.stats()["donors"]
    assert 0 < donors["nodes"] < 14
    assert donors["bytes"]["host"] <= 1 << 20
    assert donors["events"]["forgotten"] == 14 - donors["nodes"]
    newest = llm.generate(numbers[-1].tolist(), _PARAMS)
    assert newest.provenance.recomputed == 1
    oldest = llm.generate(numbers[0].tolist(), _PARAMS)
    assert oldest.provenance.declined == "no_donor"
