"""Streams of prompts from files in the datasets' own schemas."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.datasets import DATASETS, read_stream

_WILDCHAT = {
    "conversation_hash": "0a",
    "conversation": [
        {"role": "user", "content": "first question", "language": "English"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "second question"},
    ],
}
_LMSYS = {
    "conversation_id": "1",
    "conversation": [{"content": "hello", "role": "user"}, {"content": "hi", "role": "assistant"}],
}
_SHAREGPT = {
    "id": "2",
    "conversations": [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "what now?"},
        {"from": "gpt", "value": "this"},
    ],
}
_NO_USER = {"id": "3", "conversations": [{"from": "gpt", "value": "I begin"}]}
_EMPTY = {"id": "4", "conversations": []}


def test_first_user_turns(tmp_path: Path) -> None:
    rows = [_WILDCHAT, _LMSYS, _SHAREGPT, _NO_USER, _EMPTY, {"text": "plain\u2028text"},
            {"text": " "}]  # fmt: skip
    expected = ["first question", "hello", "what now?", "plain\u2028text"]
    lines = tmp_path / "s.jsonl"
    lines.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert read_stream(str(lines)) == expected
    assert read_stream(str(lines), 2) == expected[:2]
    listed = tmp_path / "s.json"
    listed.write_text(json.dumps(rows), encoding="utf-8")
    assert read_stream(str(listed)) == expected


def test_turns_as_columns() -> None:
    columns = {"from": ["system", "human"], "value": ["be kind", "hello"]}
    assert DATASETS["sharegpt"].prompt({"conversations": columns}) == "hello"
    assert DATASETS["sharegpt"].prompt({"conversations": None}) is None


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "s.parquet"
    parquet.write_table(pa.Table.from_pylist([_LMSYS, _LMSYS]), path)
    assert read_stream(str(path)) == ["hello", "hello"]
    path.write_bytes(b"PAR0")
    with pytest.raises(ConfigError, match=r"s\.parquet"):
        read_stream(str(path))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow.*kvshare-mm\[hub\]"):
        read_stream(str(tmp_path / "s.parquet"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"answer": 1}', "none of the fields"),
        ('{"conversation": []}', "no prompts"),
        ("nonsense", "no JSON"),
        ("", "no lines"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_stream(str(path))


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wildchat, sharegpt, lmsys"):
        read_stream("nowhere")
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_stream(str(tmp_path / "nowhere.json"))
    listed = tmp_path / "s.json"
    listed.write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="list of objects"):
        read_stream(str(listed))


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def load(hub_id: str, *, split: str, streaming: bool) -> Any:
        assert (hub_id, split, streaming) == ("allenai/WildChat-1M", "train", True)
        for _ in range(10**9):
            taken.append(1)
            yield _WILDCHAT

    fake_hub(monkeypatch, load)
    assert read_stream("wildchat", 3) == ["first question"] * 3
    assert len(taken) == 3


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    fake_hub(monkeypatch, load)
    with pytest.raises(ConfigError, match=r"lmsys/lmsys-chat-1m.*no route.*local"):
        read_stream("lmsys")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"kvshare-mm\[hub\]"):
        read_stream("lmsys")
