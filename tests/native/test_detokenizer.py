"""Streaming text: what is sent adds up to the answer, whole characters only, no stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvshare_mm.native.detokenizer import Detokenizer

from ..helpers import byte_tokenizer

EOS = "<|end|>"
CORPUS = [
    "the quick brown fox jumps over the lazy dog. STOP here, and stop there! END",
    "das Blutbild des Patienten zeigt erhöhte Werte: Hämoglobin 14,2 g/dl",
    "患者的血液检查结果显示正常。人工智能改变世界。",
    "こんにちは世界。ありがとうございます。",
    "🙂🙃😀 👩‍👩‍👧‍👦 🇩🇪 ok\n\nUser: hello\nAssistant: hi",
]
TEXT = st.text(
    st.one_of(
        st.sampled_from("the quick brown fox.\n :STOPEND"),
        st.sampled_from("患者的血液检查结果世界こんにちは"),
        st.sampled_from("🙂🙃😀👩‍👧🇩🇪äöü\u0301\ufffd"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE of 256 bytes and some 150 merges: most CJK and emoji are several tokens."""
    return byte_tokenizer(CORPUS * 3, 420, [EOS], eos_token=EOS)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _one_byte_each(tokenizer: Any, text: str) -> list[int]:
    """The text spelled byte by byte: the hardest cut there is."""
    alphabet = dict(zip(range(256), _byte_letters(), strict=True))
    return [tokenizer.convert_tokens_to_ids(alphabet[b]) for b in text.encode()]


def _byte_letters() -> list[str]:
    """GPT-2's letter of every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    return [letters[b] for b in range(256)]


def _stream(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Any]:
    """All that is sent, and the detokenizer; ends as the engine does, when a stop was found."""
    detokenizer = Detokenizer(tokenizer, stop)
    sent = []
    for token in ids:
        sent.append(detokenizer.add(token))
        assert "".join(sent) == detokenizer.text[: len("".join(sent))]
        if detokenizer.stopped:
            break
    sent.append(detokenizer.finish())
    return sent, detokenizer


def _expected(tokenizer: Any, ids: list[int], stop: tuple[str, ...]) -> str:
    """The text cut at the first stop string, looked for in whole decodes token by token."""
    for k in range(1, len(ids) + 1):
        text: str = tokenizer.decode(ids[:k], skip_special_tokens=True)
        if text.endswith("\ufffd") and k < len(ids):
            continue
        hits = [text.find(s) for s in stop if s in text]
        if hits:
            return text[: min(hits)]
    whole: str = tokenizer.decode(ids, skip_special_tokens=True)
    return whole


# -- text -----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 419), max_size=40))
def test_any_tokens_at_all(tokenizer: Any, ids: list[int]) -> None:
    """A model may well write bytes that are no text."""
    ids = [i % len(tokenizer) for i in ids]
    sent, detokenizer = _stream(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(sent) == detokenizer.text == whole


def test_a_character_is_sent_with_its_last_token(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ())
    parts = [detokenizer.add(i) for i in _one_byte_each(tokenizer, "a世🙂b")]
    assert parts == ["a", "", "", "世", "", "", "", "🙂", "b"]


def test_finish_twice_sends_nothing_twice(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ("XYZ",))
    for i in _ids(tokenizer, "some XY"):
        detokenizer.add(i)
    assert detokenizer.finish().endswith("XY")
    assert detokenizer.finish() == ""
    assert detokenizer.text == "some XY"


def test_a_tokenizer_that_drops_the_first_space() -> None:
    """SentencePiece models decode '▁world' alone as 'world', behind a word as ' world'."""
    words = {"▁hello": 0, "▁world": 1, "s": 2, "<unk>": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    ids = [0, 1, 2, 1, 1, 0, 2]
    sent, detokenizer = _stream(tokenizer, ids)
    assert sent == ["hello", " world", "s", " world", " world", " hello", "s", ""]
    assert detokenizer.text == tokenizer.decode(ids)


# -- stop strings ---------------------------------------------------------------------------


@settings(max_examples=200)
@given(text=TEXT, data=st.data(), spelled=st.booleans())
def test_what_is_sent_adds_up_to_the_text_before_any_stop_string(
    tokenizer: Any, text: str, data: st.DataObject, spelled: bool
) -> None:
    """Stops are mostly cut from the text, so that they are found, in all places and overlaps."""
    stops = []
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, max(0, len(text) - 1)))
        cut = text[start : start + data.draw(st.integers(1, 6))]
        stops.append(cut or data.draw(st.sampled_from(["STOP", "END", "世界", "🙂"])))
    stop = tuple(stops)
    ids = _one_byte_each(tokenizer, text) if spelled else _ids(tokenizer, text)
    sent, detokenizer = _stream(tokenizer, ids, stop)
    want = _expected(tokenizer, ids, stop)
    assert "".join(sent) == detokenizer.text == want
    assert "\ufffd" in text or all("\ufffd" not in part for part in sent)
    assert detokenizer.stopped == (want != text or any(s in text for s in stop))
    assert not any(s in detokenizer.text for s in stop)


def test_one_letter_stops_hold_nothing_back(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ("#", "~"))
    assert [detokenizer.add(i) for i in _one_byte_each(tokenizer, "abc")] == ["a", "b", "c"]
