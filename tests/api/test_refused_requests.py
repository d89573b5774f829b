"""Requests that cannot be served: refused at the call, and nothing is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvshare_mm import InvalidRequestError, KVShare, RequestOptions, SamplingParams

from .prompts import _CHAT, _PARAMS, OpenLLM

_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def user(content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ([[]], "empty"),
        (["The fox.", ""], "empty"),
        ([5, 379], "0..378"),
        ([-1], "0..378"),
        ([[5], [5, 10**9]], "0..378"),
        ([True, False], "text or a list of token ids"),
        ([5, "The fox."], "text or a list of token ids"),
        (["The fox.", 5], "text or a list of token ids"),
        ([5, 6.0], "text or a list of token ids"),
        (b"The fox.", "text or a list of token ids"),
        (5, "token ids"),
        (None, "token ids"),
        ({"prompt": "The fox."}, "token ids"),
        (np.array([5, 6]), "token ids"),
        ("half a \ud83d face", "surrogate"),
        ("a b " * 300, "context holds 512"),
        (["The fox.", "a b " * 300], "context holds 512"),
        ([5] * 512, "context holds 512"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_prompts_that_are_refused(llm: KVShare, prompt: Any, message: str) -> None:
    before = llm.stats()["requests"]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(prompt, _PARAMS)
    assert caught.value.field == "prompt"
    if not isinstance(prompt, list):
        # At the call, not at the first chunk.
        for call in (llm.stream, llm.astream):
            with pytest.raises(InvalidRequestError):
                call(prompt, _PARAMS)
        with pytest.raises(InvalidRequestError):
            asyncio.run(llm.agenerate(prompt, _PARAMS))
    assert llm.stats()["requests"] == before


@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([], "messages", "at least one message"),
        (None, "messages", "at least one message"),
        ("Hello", "messages", "at least one message"),
        (user("Hello")[0], "messages", "at least one message"),
        (user(""), "messages", "empty"),
        (user("  "), "messages", "empty"),
        (["Hello"], "messages[0]", "needs a role"),
        ([{"content": "Hello"}], "messages[0]", "needs a role"),
        ([{"role": 7, "content": "Hello"}], "messages[0]", "needs a role"),
        ([{"role": "user"}], "messages[0]", "content must be"),
        (user(None), "messages[0]", "content must be"),
        (user(7), "messages[0]", "content must be"),
        (user([]), "messages[0]", "content must be"),
        ([*_CHAT, *user(None)], "messages[2]", "content must be"),
        (user([_IMAGE]), "messages[0].content[0]", "'image_url'.*takes parts of type text"),
        (user([{"type": "text", "text": "See"}, _IMAGE]), "messages[0].content[1]", "'image_url'"),
        (user([{"type": "input_audio"}]), "messages[0].content[0]", "'input_audio'"),
        (user([{"type": "text"}]), "messages[0].content[0]", "without text"),
        (user(["Hello"]), "messages[0].content[0]", "object with a type"),
        (user("half a \ud83d face"), "messages", "surrogate"),
        (user("a b " * 300), "prompt", "context holds 512"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_messages_that_are_refused(llm: KVShare, messages: Any, field: str, message: str) -> None:
    before = llm.stats()["requests"]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.chat(messages, _PARAMS)
    assert caught.value.field == field
    with pytest.raises(InvalidRequestError):
        asyncio.run(llm.achat(messages, _PARAMS))
    assert llm.stats()["requests"] == before


def test_a_template_that_refuses_is_the_requests_fault(open_llm: OpenLLM) -> None:
    llm = open_llm()
    llm.tokenizer.chat_template = "{{ raise_exception('only user and assistant take turns') }}"
    with pytest.raises(InvalidRequestError, match="take turns"):
        llm.chat(_CHAT)
    llm.tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        llm.chat(_CHAT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "many"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", 2),
        ("seed", "abc"),
        ("seed", 1 << 64),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", 7),
        ("ignore_eos", "yes"),
        ("logprobs", -1),
        ("logprobs", 10_000),
    ],
)
def test_sampling_values_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reuse", "sometimes"),
        ("reuse", True),
        ("repair", "magic"),
        ("repair", "window:-1"),
        ("repair", ""),
        ("repair", 8),
        ("max_divergence", -0.1),
        ("max_divergence", float("nan")),
        ("max_divergence", "small"),
        ("max_divergence", True),
        ("max_divergence", 10**400),
        ("cache_salt", 7),
        ("store", None),
    ],
)
def test_request_options_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        RequestOptions(**{field: value})
    assert caught.value.field == field


def test_two_policies_for_one_request_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="one of the two"):
        RequestOptions(repair="window:3", max_divergence=0.1)


def test_options_of_the_wrong_kind_do_not_reach_the_engine(llm: KVShare) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("The fox.", {"max_tokens": 3}),  # type: ignore[call-overload]
        lambda: llm.generate("The fox.", _PARAMS, {"reuse": "off"}),  # type: ignore[call-overload]
        lambda: llm.chat(_CHAT, RequestOptions()),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            call()
    assert len(llm.generate("The fox.", _PARAMS).token_ids) == 6
