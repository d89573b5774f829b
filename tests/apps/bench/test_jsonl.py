"""JSON Lines and what may be wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.jsonl import read_jsonl


def test_objects_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "\u2028\u2029\x85"}\n', encoding="utf-8")
    assert read_jsonl(path, "a") == [{"a": 1}, {"a": "\u2028\u2029\x85"}]
    path.write_text('{"a": 1}\nnonsense\n')
    assert read_jsonl(path, limit=1) == [{"a": 1}]  # what is behind the limit is not read


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n{"b": 1}', r":2 has no field a"),
        (b'{"a": 1}\n\nnonsense', r":3 is no JSON"),
        (b"[1]", r":1 is no JSON object"),
        (b"", "no lines"),
        (b"\xff", "cannot read"),
    ],
)
def test_what_is_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_jsonl(path, "a")
