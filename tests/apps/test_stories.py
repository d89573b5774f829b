"""Stories with pictures: alike where they say so, and told as others are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvshare_mm import KVShare
from kvshare_mm.apps import showcase
from kvshare_mm.apps.stories import Story, picture_stories

from .conftest import Run

FIGURES = {"name", "tokens", "same_answer", "answer", "methods"}


@pytest.fixture
def console() -> Iterator[Console]:
    with open(os.devnull, "w") as nowhere:
        yield Console(width=200, record=True, file=nowhere)


def photos(messages: Any) -> list[np.ndarray]:
    parts = [part for message in messages for part in message["content"]]
    return [np.asarray(part["image"]) for part in parts if part["type"] == "image"]


def words(messages: Any) -> list[list[str]]:
    return [[p["text"] for p in m["content"] if p["type"] == "text"] for m in messages]


def test_picture_stories_are_what_they_say() -> None:
    same, other = picture_stories()
    assert np.array_equal(photos(same.donor), photos(same.target))
    for mine, theirs in zip(words(same.donor)[1], words(same.target)[1], strict=True):
        assert mine != theirs  # the customer, the question
    assert words(other.donor)[1] == words(other.target)[1]
    assert not np.array_equal(photos(other.donor), photos(other.target))
    for story in (same, other):
        assert story.right != story.before
        rules, since = (words(asked)[0][0] for asked in (story.donor, story.target))
        assert rules.replace("10:42:07", "10:43:51", 1) == since != rules  # the clock in front


def test_every_run_tells_the_same() -> None:
    one, two = picture_stories(), picture_stories()
    assert [words(s.target) for s in one] == [words(s.target) for s in two]
    assert all(
        np.array_equal(photos(a.donor), photos(b.donor)) for a, b in zip(one, two, strict=True)
    )


def test_they_are_told(media_folder: Callable[[str], Path], console: Console) -> None:
    """On a random model; the answers mean nothing."""
    with KVShare(str(media_folder("qwen2_5_vl")), embedder=None, repair="none") as llm:
        report = showcase.run(llm, console, 1, 4, None, picture_stories(), show_prompts=True)
    shown = console.export_text()
    assert shown.count("image known: its KV is reused, its encoder does not run") == 1  # of two
    assert "image new: its encoder runs" in shown
    assert "[image: 112x112, seen as 112x112]" in shown
    same, other = report["stories"]
    for story in (same, other):
        assert set(story) == FIGURES
        computed = {name: m["computed_tokens"] for name, m in story["methods"].items()}
        assert computed["prefix"] <= story["tokens"]
        # The clock ends the identical beginning; what is behind it is known all the same.
        assert computed["kvshare"] < computed["prefix"] / 2


@pytest.mark.parametrize("installed", [True, False])
def test_the_demo_tells_them_if_their_model_is_installed(
    run: Run,
    tiny_folder: Path,
    media_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: bool,
) -> None:
    def folder(name: str) -> Path:
        if not installed:
            raise FileNotFoundError(name)
        return media_folder("qwen2_5_vl")

    monkeypatch.setattr("kvshare_mm.assets.folder", folder)
    told = (Story("fox", "nothing alike", "The quick brown fox.", "Laboratory report.", right=""),)
    monkeypatch.setattr("kvshare_mm.apps.showcase.STORIES", told)
    out = tmp_path / "demo.json"
    options = ["--model", str(tiny_folder), "--repeats", "1", "--max-tokens", "3"]
    done = run("demo", *options, "--json", out)
    assert done.exit_code == 0, done.output
    assert ("same photos" in done.output) == installed
    assert ('"pictures"' in out.read_text()) == installed
