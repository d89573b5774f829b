"""Pairs of prompts: texts, and messages whose media lie beside the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench import reuse
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.prompts import is_fitted_to, read_pairs, read_prompts, with_media_paths
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.config import KVShareConfig

from ...modalities.media import encoded, picture


def asked(question: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    text = {"type": "text", "text": question}
    return [{"role": "user", "content": [{"type": "text", "text": "Look: "}, part, text]}]


@pytest.mark.parametrize(
    ("part", "moved"),
    [
        ({"type": "image", "image": "a.png"}, {"type": "image", "image": "/data/a.png"}),
        ({"type": "audio", "audio": "b/a.wav"}, {"type": "audio", "audio": "/data/b/a.wav"}),
        ({"type": "image", "image": "/x/a.png"}, {"type": "image", "image": "/x/a.png"}),
        (
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "/data/a.png", "detail": "low"}},
        ),
        (
            {"type": "image_url", "image_url": "a.png"},
            {"type": "image_url", "image_url": "/data/a.png"},
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
        ),
        ({"type": "text", "text": "a.png"}, {"type": "text", "text": "a.png"}),
        ({"type": "input_audio", "input_audio": {}}, {"type": "input_audio", "input_audio": {}}),
    ],
)
def test_relative_paths_are_the_files_neighbours(
    part: dict[str, Any], moved: dict[str, Any]
) -> None:
    assert with_media_paths(asked("?", part), Path("/data")) == asked("?", moved)


def test_texts_stay_as_they_are() -> None:
    assert with_media_paths("a.png", Path("/data")) == "a.png"


def test_pairs_with_pictures_are_measured(
    media_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(picture(112, 84)))
    (tmp_path / "other.png").write_bytes(encoded(picture(112, 84, 1)))
    photo, other = ({"type": "image", "image": f"{name}.png"} for name in ("photo", "other"))
    pairs = [
        {"donor": asked("What is it?", photo), "target": asked("What colour is it?", photo)},
        {"donor": asked("What is it?", photo), "target": asked("What is it?", other)},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model = str(media_folder("qwen2_5_vl"))
    config = KVShareConfig(model=model, dtype="float32", min_gain_tokens=4, repair="none")
    rig = Rig(config, num_slots=3)
    try:
        methods = [METHODS[name] for name in ("prefix", "kvshare")]
        report = reuse.run(rig, read_pairs(file), methods, max_new_tokens=4, repeats=1)
    finally:
        rig.close()
    assert report["pairs"] == 2
    assert report["skipped"] == []
    same, changed = report["per_pair"]
    for pair in (same, changed):
        assert pair["methods"]["full"]["computed_tokens"] == pair["tokens"]
        assert pair["methods"]["prefix"]["kl_first_token"] < 1e-4
        assert pair["methods"]["prefix"]["greedy_agreement"] == 1
    assert same["methods"]["prefix"]["computed_tokens"] < same["tokens"] - 12
    # The other picture's twelve positions and the last one.
    assert changed["methods"]["kvshare"]["computed_tokens"] == 13


def test_pairs_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"donor": "a", "target": "b"}\n\n{"id": 7, "donor": "c", "target": "d"}\n')
    assert [p["id"] for p in read_pairs(path)] == ["1", 7]
    assert len(read_pairs(path, 1)) == 1
    for content in (b"", b'{"donor": "a"}', b'{"donor": "", "target": "b"}'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"pairs\.jsonl"):
            read_pairs(path)
    with pytest.raises(ConfigError):
        read_pairs(tmp_path)


def test_pairs_that_nothing_is_fitted_to(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"id": {n}, "donor": "a", "target": "b"}}\n' for n in range(200)))
    held_out = [p["id"] for p in read_pairs(path, held_out=True)]
    assert 50 < len(held_out) < 110  # 40% of them
    assert held_out == [n for n in range(200) if not is_fitted_to(str(n))]
    assert [p["id"] for p in read_pairs(path, 2, held_out=True)] == held_out[:2]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\u2028two\n\nthree\n", encoding="utf-8")
    assert read_prompts(plain) == ["one\u2028two", "three"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"text": "a\u2028b"}\r\n{"text": "c"}', encoding="utf-8")
    assert read_prompts(lines) == ["a\u2028b", "c"]
