"""A text that cannot fit is refused before it is tokenised; one that can never is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from kvshare_mm import KVShare
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.text_bound import TextBound


class Untouched:
    """Stands for a tokenizer that must not be asked."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *_: Any, **__: Any) -> None:
        pytest.fail("it was tokenised")

    def apply_chat_template(self, *_: Any, **__: Any) -> None:
        pytest.fail("a template was filled in")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_folder)


@pytest.fixture
def guarded(open_llm: Callable[..., KVShare], monkeypatch: pytest.MonkeyPatch) -> KVShare:
    llm = open_llm()
    loaded = llm._parts.loaded
    object.__setattr__(loaded, "tokenizer", Untouched(loaded.tokenizer))
    return llm


LONG = "a" * 1_000_000
CHATS: dict[str, Any] = {
    "one text": [{"role": "user", "content": LONG}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": LONG[:4_000]}] * 20}],
    "many": [{"role": "user", "content": LONG[:4_000]}] * 20,
    "before media": [
        {"role": "user", "content": [{"type": "image", "image": b"?"}]},
        {"role": "user", "content": LONG},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_that_cannot_fit_is_refused_unread(guarded: KVShare, name: str) -> None:
    for ask in (guarded.chat, guarded.lookup, guarded.tokenize):
        with pytest.raises(InvalidRequestError, match="no text of 512 tokens") as caught:
            ask(CHATS[name])
        assert caught.value.field == "messages"


@pytest.mark.parametrize("prompt", [LONG, [0] * 100_000])
def test_a_prompt_that_cannot_fit_is_refused_unread(guarded: KVShare, prompt: Any) -> None:
    for ask in (guarded.generate, guarded.lookup, guarded.tokenize):
        with pytest.raises(InvalidRequestError, match="the context holds"):
            ask(prompt)


@given(text=st.text(max_size=3_000))
def test_what_is_refused_would_not_have_fit(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for max_tokens in (1, 5, 50):
        bound = TextBound(tokenizer, max_tokens)
        try:
            bound.check([text], "prompt")
        except InvalidRequestError:
            assert len(tokenizer(text)["input_ids"]) > max_tokens


def test_the_longest_token_is_counted_in_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    longest = max(len(tokenizer.decode([i]).encode()) for i in range(len(tokenizer)))
    bound = TextBound(tokenizer, 3)
    assert bound.max_bytes == 3 * longest
    bound.check(["a" * bound.max_bytes], "prompt")
    with pytest.raises(InvalidRequestError):
        bound.check(["a" * bound.max_bytes, "a"], "prompt")
    with pytest.raises(InvalidRequestError):
        bound.check(["\N{GREEK SMALL LETTER ALPHA}" * (bound.max_bytes // 2 + 1)], "prompt")


def test_characters_that_will_be_composed_count_as_composed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    jamo = "\u1112\u1161\u11ab"  # nine bytes that become one syllable of three
    bound = TextBound(tokenizer, 100)
    fits = bound.max_bytes // 3
    with pytest.raises(InvalidRequestError):
        bound.check([jamo * fits], "prompt")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    bound = TextBound(tokenizer, 100)
    bound.check([jamo * fits], "prompt")
    with pytest.raises(InvalidRequestError):
        bound.check([jamo * (fits + 1)], "prompt")
    with pytest.raises(InvalidRequestError):
        bound.check(["\udc00" * 10 * bound.max_bytes], "prompt")
