"""What a prompt is known by, and what is remembered of it."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.router.memory import NGRAMS, Memory
from kvshare_mm.apps.router.prompt import Prompt, prompt_of
from kvshare_mm.index.ngrams import ngram_hashes

_REPORT = "Patient 48210, haemoglobin 148 g/L, sodium 141 mmol/L, seen on the second floor."


def chat(*contents: Any, key: str = "", **fields: Any) -> Prompt:
    messages = [{"role": "user", "content": content} for content in contents]
    found = prompt_of({"messages": messages, **fields}, key)
    assert found is not None
    return found


def share(earlier: Prompt, later: Prompt) -> float:
    memory = Memory()
    memory.add(earlier, 1)
    return memory.shares(later, [1])[1]


def picture(content: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("one", "other", "least", "most"),
    [
        (chat(_REPORT), chat(_REPORT), 1, 1),
        (chat(_REPORT), chat([text(_REPORT)]), 1, 1),
        (chat(_REPORT), chat(_REPORT.replace("148", "97")), 0.7, 0.99),
        (chat("It is 10:42. " + _REPORT), chat("It is 10:43. " + _REPORT), 0.8, 0.99),
        (chat(_REPORT), chat(_REPORT, "And the sodium?"), 0.7, 0.99),
        (chat(_REPORT), chat("What is the capital of France? Answer in one word."), 0, 0.1),
        (chat([picture("aa"), text("Broken?")]), chat([picture("aa"), text("What?")]), 0.8, 1),
        (chat([picture("aa"), text("What?")]), chat([picture("ab"), text("What?")]), 0, 0.1),
        (chat(_REPORT, tools=[{"name": "a"}]), chat(_REPORT, tools=[{"name": "b"}]), 0.6, 0.99),
        (chat("血糖の値は九十七です。"), chat("血糖の値は八十八です。"), 0.3, 0.9),
        # Who asked, with which salt, of which model.
        (chat(_REPORT, key="a"), chat(_REPORT, key="b"), 0, 0),
        (chat(_REPORT, cache_salt="a"), chat(_REPORT), 0, 0),
        (chat(_REPORT, model="a"), chat(_REPORT, model="b"), 0, 0),
    ],
)  # fmt: skip
def test_what_is_alike(one: Prompt, other: Prompt, least: float, most: float) -> None:
    assert least <= share(one, other) <= most


@pytest.mark.parametrize(
    ("prompt", "same"),
    [(_REPORT, [_REPORT]), (list(range(9)), [list(range(9))]), ([_REPORT, "b"], [_REPORT, "b"])],
)
def test_prompts_of_completions(prompt: Any, same: Any) -> None:
    one, other = (prompt_of({"prompt": p}, "") for p in (prompt, same))
    assert one is not None and other is not None
    assert np.array_equal(one.words, other.words) and len(one.words) >= 9


def test_how_it_may_be_reused() -> None:
    assert chat(_REPORT, kvshare=None).reads and chat(_REPORT, kvshare=None).stored
    assert not chat(_REPORT, kvshare={"reuse": "off"}).reads
    assert not chat(_REPORT, kvshare={"store": False}).stored


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("content"), inner),
    max_leaves=12,
)
_FIELDS = st.sampled_from(["messages", "prompt", "tools", "kvshare", "cache_salt", "model"])


@given(st.dictionaries(_FIELDS, _JSON | st.lists(st.dictionaries(st.just("content"), _JSON))))
def test_any_body_is_read_or_not_but_never_fails(body: dict[str, Any]) -> None:
    found = prompt_of(body, "")
    assert found is None or len(found.words)


def test_long_prompts_are_bounded_and_contents_not_held() -> None:
    found = chat("secret word " * 300_000, key="the-key")
    assert len(found.words) <= 1 << 17
    memory = Memory()
    memory.add(chat(_REPORT, key="the-key"), 1)
    held = [p.values for p in memory._index._namespaces.values()]
    kept = pickle.dumps([list(memory._known), held])
    assert len(memory) == 1 and b"haemoglobin" not in kept and b"the-key" not in kept


def test_shares_are_those_of_a_count_and_of_samples_near_it() -> None:
    draw = random.Random(0)
    for length, within in ((NGRAMS, 1e-9), (4000, 0.15)):
        memory = Memory()
        stored = np.array([draw.randrange(1 << 40) for _ in range(length)], np.uint64)
        asked = stored.copy()
        asked[: length // 3] += np.uint64(1)
        memory.add(Prompt("a", stored), 1)
        both = np.isin(np.unique(ngram_hashes(asked)), ngram_hashes(stored)).mean()
        assert abs(memory.shares(Prompt("a", asked), [1, 2])[1] - both) < within
        assert memory.shares(Prompt("a", asked), [2]) == {2: 0.0}


def test_those_used_longest_ago_are_forgotten_first() -> None:
    memory = Memory(max_requests=3)
    prompts = [chat(f"{word} " * 4 + word.upper() * 3) for word in ("a", "b", "c", "d")]
    for prompt in prompts[:3]:
        assert memory.add(prompt, 1)
    assert memory.add(prompts[0], 1, answered=True) is None
    assert memory.add(prompts[0], 1) is None  # known, and used
    assert memory.shares(prompts[1], [1]) == {1: 1.0}  # so is this one
    memory.add(prompts[3], 1)
    assert len(memory) == 3
    assert [memory.shares(p, [1])[1] == 1.0 for p in prompts] == [True, True, False, True]


def test_what_was_not_answered_is_forgotten() -> None:
    memory = Memory()
    known = memory.add(chat(_REPORT), 1)
    assert known is not None
    memory.add(chat(_REPORT), 2)
    memory.forget(known)
    memory.forget(known)
    assert memory.shares(chat(_REPORT), [1, 2]) == {1: 0.0, 2: 1.0}
    assert len(memory) == 1 and 0 < memory.num_bytes < 5000
