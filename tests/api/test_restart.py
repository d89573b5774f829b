"""Stores that are opened again: after a close, by another model, after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from kvshare_mm import KVShare, RequestOptions, RequestOutput

from .prompts import _DONOR, _PARAMS, _TARGET, OpenLLM, events


def test_a_reopened_store_serves_reuse(
    open_llm: OpenLLM, full: RequestOutput, tmp_path: Path
) -> None:
    first = open_llm(store_dir=tmp_path, repair="auto:0.0001")
    first.generate(_DONOR, _PARAMS)
    first.close()  # without a flush
    second = open_llm(store_dir=str(tmp_path), repair="window:2")
    assert events(second)["restored"] == 1
    output = second.generate(_TARGET, _PARAMS)
    assert output.provenance.reused > len(output.prompt_token_ids) // 2
    assert output.provenance.fallback is None
    again = second.generate(_DONOR, _PARAMS)
    assert again.provenance.recomputed == 1
    second.close()
    third = open_llm(store_dir=tmp_path)
    assert events(third)["restored"] == 2  # the second was edited from the first
    repeated = third.generate(_TARGET, _PARAMS)
    assert repeated.provenance.recomputed < full.provenance.recomputed


def test_salts_hold_over_a_restart(open_llm: OpenLLM, tmp_path: Path) -> None:
    first = open_llm(store_dir=tmp_path, cache_salt="a")
    first.generate(_DONOR, _PARAMS)
    first.close()
    second = open_llm(store_dir=tmp_path, cache_salt="b")
    assert second.generate(_TARGET, _PARAMS).provenance.declined == "no_donor"
    options = RequestOptions(cache_salt="a")
    assert second.generate(_TARGET, _PARAMS, options).provenance.reused > 0


def test_another_models_donors_are_left_alone(
    open_llm: OpenLLM, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    first = open_llm(store_dir=tmp_path / "store")
    first.generate(_DONOR, _PARAMS)
    first.close()
    with KVShare(str(other), embedder=None, store_dir=tmp_path / "store") as second:
        assert "restored" not in events(second)
        assert second.generate(_TARGET, _PARAMS).provenance.declined == "no_donor"
    third = open_llm(store_dir=tmp_path / "store")
    assert events(third)["restored"] == 1
