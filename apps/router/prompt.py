"""What a router knows a prompt by: hashes of its words, in order. It has no tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose bodies have prompts."""

_WORD = re.compile(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]")
_MOST_CHARACTERS = 1 << 20
_MOST_WORDS = 1 << 17
# A picture counts as so many words: all of it is shared, or nothing.
_MEDIUM_WORDS = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, without its contents.

    Attributes:
        namespace: of its tenant, salt and model: nobody else's decide where it goes.
        words: ``[N]`` uint64 hashes under a secret of this process (`hash`).
        reads: whether it may reuse what is stored.
        stored: whether it can be a donor.
    """

    namespace: str
    words: NDArray[np.uint64]
    reads: bool = True
    stored: bool = True


def prompt_of(body: Any, authorization: str) -> Prompt | None:
    """The prompt of a chat or completion; None: it has none that we could read.

    Args:
        body: parsed JSON, whatever it is; what is wrong with it the replica will say.
        authorization: the request's header; "" if there is none.
    """
    if not isinstance(body, dict):
        return None
    words: list[int] = []
    left = _MOST_CHARACTERS
    for piece in _pieces(body):
        if isinstance(piece, str):
            words += map(hash, _WORD.findall(piece[:left]))
            left -= len(piece)
        else:
            words += piece
        if left <= 0 or len(words) >= _MOST_WORDS:
            break
    if not words:
        return None
    ours = body.get("kvshare")
    ours = ours if isinstance(ours, dict) else {}
    owner = json.dumps([authorization, body.get("cache_salt"), body.get("model")], default=str)
    return Prompt(
        hashlib.blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(),
        np.array(words[:_MOST_WORDS], np.int64).view(np.uint64),
        reads=ours.get("reuse") != "off",
        stored=ours.get("store") is not False,
    )


def _pieces(body: dict[str, Any]) -> Iterator[str | list[int]]:
    """Text, and what stands for something else, in the order in which a model reads it."""
    if body.get("tools"):
        yield json.dumps(body["tools"])
    for prompt in _listed(body.get("prompt")):
        if isinstance(prompt, str):
            yield prompt
        elif isinstance(prompt, list):
            yield [hash(token) for token in prompt if isinstance(token, int)]
        elif isinstance(prompt, int):
            yield [hash(prompt)]
    for message in _listed(body.get("messages")):
        if not isinstance(message, dict):
            continue
        yield str(message.get("role"))
        for part in _listed(message.get("content")):
            if isinstance(part, str):
                yield part
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
            else:
                medium = _identity(part)
                yield [hash((medium, offset)) for offset in range(_MEDIUM_WORDS)]
        if message.get("tool_calls"):
            yield json.dumps(message["tool_calls"])


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _identity(value: Any) -> int:
    """The same for the same JSON."""
    if isinstance(value, dict):
        return hash(frozenset((key, _identity(v)) for key, v in value.items()))
    if isinstance(value, list):
        return hash(tuple(map(_identity, value)))
    return hash(value)
