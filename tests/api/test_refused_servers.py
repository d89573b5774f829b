"""Servers that cannot be made: refused before a model is loaded, and nothing is left."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import ConfigError, KVShare, ModelLoadError, StoreError
from kvshare_mm.config import KVShareConfig

from ..helpers import until


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": True}, "speculative"),
        ({"Reuse": "similar"}, "Reuse"),
        ({"reuse": "on"}, "similar"),
        ({"sharing": "off"}, "sharing is called reuse now"),
        ({"repair": "magic:3"}, "repair.*magic"),
        ({"repair": "window:x"}, "repair"),
        ({"max_divergence": -1}, "max_divergence"),
        ({"max_divergence": 0.1, "repair": "window:3"}, "one of the two"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"max_queue": 0}, "max_queue"),
        ({"max_model_len": 3}, "max_model_len"),
        ({"min_gain_share": 1.5}, "min_gain_share"),
        ({"host_bytes": -1}, "host_bytes"),
        ({"dtype": "int3"}, "dtype"),
        ({"engine": "warp"}, "engine"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"index_uri": "milvus.txt"}, "index_uri"),
        ({"max_queue": 0, "min_run": 0}, "max_queue.*min_run"),
    ],
    ids=str,
)
def test_options_that_are_refused_before_a_model_is_loaded(
    tiny_folder: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare_mm.assemble.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        KVShare(str(tiny_folder), **{"embedder": None, **options})


@pytest.mark.parametrize("below", ["file", "proc"])
def test_a_store_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "store" if below == "file" else Path("/proc/kvshare")
    monkeypatch.setattr("kvshare_mm.assemble.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(StoreError, match=str(folder)):
        KVShare(str(tiny_folder), embedder=None, store_dir=folder)


def test_a_failed_start_leaves_no_threads(tiny_folder: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"max_model_len=513.*512"):
        KVShare(str(tiny_folder), embedder=None, store_dir=tmp_path, max_model_len=513)
    with pytest.raises(ModelLoadError, match="no model folder"):
        KVShare(str(tmp_path / "nowhere"), store_dir=tmp_path)
    with pytest.raises(ConfigError, match="model"):
        KVShare(7)  # type: ignore[arg-type]
    until(lambda: set(threading.enumerate()) <= before)  # others may end meanwhile


@pytest.mark.parametrize(
    ("given", "per_token", "budget"),
    [
        (None, 0, 2 << 30),
        (None, 46_080, 65_536 * 46_080),
        (None, 1 << 30, -1),
        (5 << 20, 46_080, 5 << 20),
    ],
)
def test_ram_for_donors_follows_the_model(given: int | None, per_token: int, budget: int) -> None:
    """A token of KV may take 12 KB or 500."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    want = max(2 << 30, ram // 4 if budget < 0 else min(budget, ram // 4))
    assert KVShareConfig.of(host_bytes=given).host_budget(per_token) == (given or want)
