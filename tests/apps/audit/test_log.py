"""What a user's log may look like, and what is said of one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.audit.log import families, read_log
from kvshare_mm.errors import ConfigError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_every_form_is_one_request(log: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    lines: list[Any] = [
        {"model": "gpt-4o", "messages": chat, "temperature": 0.7, "n": 3, "stop": ["."],
         "max_completion_tokens": 9, "stream": True, "cache_salt": "shop"},
        {"custom_id": "1", "method": "POST", "body": {"messages": chat, "max_tokens": 5}},
        {"prompt": "Once upon"},
        {"prompt": [1, 2, 3]},
        {"text": "How are you?"},
    ]  # fmt: skip
    log.write_text("\n\n".join(map(json.dumps, lines)))
    a, b, c, d, e = read_log(log, max_tokens=64)
    assert (a.body, a.salt) == ({"messages": chat, "stop": ["."], "max_tokens": 9}, "shop")
    assert (a.sampled, b.sampled) == (True, False)
    assert (b.body, b.texts) == ({"messages": chat, "max_tokens": 5}, ("Be brief.", "Hi"))
    assert (c.path, c.body) == ("completions", {"prompt": "Once upon", "max_tokens": 64})
    assert (d.body["prompt"], d.texts) == ([1, 2, 3], ("1 2 3",))
    assert e.body["messages"] == [{"role": "user", "content": "How are you?"}]
    assert [x.line for x in (a, b, c, d, e)] == [1, 3, 5, 7, 9]
    assert len(read_log(log, 64, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"question": "x"}', "has no messages"),
        ('{"messages": []}', "messages: List should have at least 1 item"),
        ('{"messages": [{"content": "x"}]}', "messages.0.role: Field required"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages.0.content"),
        ('{"prompt": ["a", "b"]}', "a line each"),
        ('{"prompt": ""}', "needs a prompt"),
        ('{"text": " "}', "has no messages"),
        ('{"text": "x", "max_tokens": -1}', "max_tokens: Input should be greater"),
        ('{"text": "x", "max_tokens": "7"}', "max_tokens: Input should be a valid integer"),
        ('{"text": "x", "cache_salt": 5}', "cache_salt: Input should be a valid string"),
    ],
)
def test_a_bad_line_is_named(log: Path, line: str, word: str) -> None:
    log.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=r"log\.jsonl:3") as caught:
        read_log(log, 64)
    assert word in str(caught.value)


def test_an_empty_log(log: Path) -> None:
    log.write_text("\n")
    with pytest.raises(ConfigError, match="has no requests"):
        read_log(log, 64)


def test_families_are_requests_made_alike(log: Path) -> None:
    form = "Report of patient {}: the urea is {} and the sodium {}. What is high?"
    turns = [{"role": "user", "content": "Tell me of the long way to Oslo, please."}]
    more = [{"role": "assistant", "content": "It is long."}, {"role": "user", "content": "Ok."}]
    lines: list[dict[str, Any]] = [
        {"text": form.format(7, 5.1, 140)},
        {"messages": turns},
        {"text": form.format(48210, 9, 131)},
        {"text": "x"},
        {"messages": turns + more},
        {"text": form.format(7, 5.1, 140), "cache_salt": "other"},
    ]
    log.write_text("\n".join(map(json.dumps, lines)))
    assert families(read_log(log, 64)) == [1, 2, 1, 4, 2, 6]
