"""The `kvshare` command with pictures and sound, on tiny random models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.console import Console

from kvshare_mm import KVShare, SamplingParams
from kvshare_mm.apps import chat as chat_app
from kvshare_mm.apps.token_view import token_view
from kvshare_mm.outputs import MediaUse, Provenance, Span

from ..media_models import tokenizer
from ..modalities.media import encoded, picture, recorded, tone
from .conftest import Run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(picture(112, 84)))
    return file


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    file = tmp_path / "clip.wav"
    file.write_bytes(recorded(tone(0.7)))
    return file


def test_a_picture_is_stored_known_again_and_inspected(
    run: Run, media_folder: Callable[[str], Path], photo: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    options = ("--model", media_folder("qwen2_5_vl"), "--image", photo, "--store-dir", store,
               "--max-tokens", "3")  # fmt: skip
    first = run("generate", "What is it?", *options)
    assert first.exit_code == 0, first.output
    label = "(112x84, seen as 112x84)"
    told = re.search(rf"image ([0-9a-f]{{8}}) {re.escape(label)}: new, encoder run", first.output)
    assert told
    again = run("generate", "What colour is it?", *options)
    assert f"image {told[1]} {label}: known, its KV reused" in again.output
    shown = run("inspect", store)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("2 donors, ")
    assert "encoder outputs kept: 1 pictures and clips, 12 positions" in shown.output
    rows = [line for line in shown.output.splitlines() if "112x84, seen as 112x84" in line]
    assert len(rows) == 2
    assert all("image" in row and told[1] in row and "(12)" in row for row in rows)
    assert len([x for x in run("inspect", store, "--tree").output.splitlines() if "owns" in x]) == 2


def test_sound_and_pictures_together(
    run: Run, media_folder: Callable[[str], Path], photo: Path, clip: Path
) -> None:
    media = ("--image", photo, "--image", photo, "--audio", clip)
    model = media_folder("qwen2_5_omni_thinker")
    done = run("generate", "What?", "--model", model, *media, "--max-tokens", "3")
    assert done.exit_code == 0, done.output
    assert done.output.count("image ") == 2
    assert "0.70 s, 16000 Hz mono" in done.output


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("qwen2_5_vl", ("--image", "/nowhere.png"), "there is no file"),
        ("qwen2_audio", ("--image", "/nowhere.png"), "takes parts of type audio"),
        ("qwen2_5_vl", ("--audio", "/nowhere.wav"), "takes parts of type image"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    run: Run, media_folder: Callable[[str], Path], family: str, options: tuple[str, ...], says: str
) -> None:
    done = run("generate", "What?", "--model", media_folder(family), *options)
    assert done.exit_code == 1
    [line] = [x for x in done.output.splitlines() if x.startswith("Error:")]
    assert says in line
    assert "messages[0].content[0]" in line


def test_raw_prompts_have_no_media(run: Run, tiny_folder: Path) -> None:
    done = run("generate", "What?", "--raw", "--image", "a.png", "--model", tiny_folder)
    assert done.exit_code == 2
    assert "text alone" in done.output


def test_a_chat_about_a_picture(
    media_folder: Callable[[str], Path],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    other = tmp_path / "other.png"
    other.write_bytes(encoded(picture(56, 56, 1)))
    asked = ["What?", "And?", f"/image {other}", "This?", "/image /nowhere.png", "Hm?", "Yes?"]
    monkeypatch.setattr(console, "input", Mock(side_effect=[*asked, EOFError]))
    model = str(media_folder("qwen2_5_vl"))
    with KVShare(model, embedder=None, dtype="float32") as llm:
        chat_app.talk(llm, console, SamplingParams(max_tokens=3), None, [str(photo)])
    lines = [x for x in console.export_text().splitlines() if "prompt tokens:" in x]
    assert [line.count("seen as") for line in lines] == [1, 1, 2, 2]  # a chat keeps its pictures
    console.file.close()


def test_media_in_a_coloured_prompt_are_shown_by_their_size() -> None:
    tok = tokenizer()
    ids = tok("ab<|image_pad|><|image_pad|><|image_pad|>cd<|AUDIO|><|AUDIO|>e")["input_ids"]
    uses = (
        MediaUse("image", 2, 5, "0" * 16, "84x28", "kv"),
        MediaUse("audio", 7, 9, "1" * 16, "0.1 s", "encoder"),
    )
    spans = (
        Span(0, 1, "exact", "d"),
        Span(1, 3, "reused", "d"),
        Span(3, 4, "recomputed"),
        Span(4, 6, "reused", "d"),
        Span(6, 10, "recomputed"),
    )
    provenance = Provenance(spans=spans, media=uses)
    text = token_view(tok, tuple(ids), provenance)
    assert text.plain == "ab[image: 84x28][...][...]cd[audio: 0.1 s]e"
    styles = [(text.plain[s.start : s.end], str(s.style).split()[-1]) for s in text.spans]
    assert styles == [
        ("a", "green3"),
        ("b", "sky_blue1"),
        ("[image: 84x28]", "sky_blue1"),
        ("[...]", "gold1"),
        ("[...]", "sky_blue1"),
        ("c", "sky_blue1"),
        ("d", "gold1"),
        ("[audio: 0.1 s]", "gold1"),
        ("e", "gold1"),
    ]
