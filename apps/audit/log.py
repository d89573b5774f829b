"""A user's own log: requests as they were sent, one a line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, ValidationError

from kvshare_mm.apps.bench.jsonl import numbered
from kvshare_mm.errors import ConfigError

# Answers are compared word by word: they are greedy, one to a request, and of no other form. Who
# shares with whom is told by `salt`; how a request reuses is what the audit varies.
_LEFT_OUT = {
    "model", "stream", "stream_options", "n", "best_of", "seed", "temperature", "top_p", "top_k",
    "min_p", "logprobs", "top_logprobs", "cache_salt", "kvshare", "kv_transfer_params", "user",
    "metadata", "store", "service_tier", "max_completion_tokens", "text",
}  # fmt: skip
_RUN = 3  # words in a row that two requests of a family share


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the log.

    Attributes:
        line: where it stands, from 1.
        path: its route in OpenAI's API.
        body: as it is sent, but for the model and how it reuses.
        salt: its own ``cache_salt``: requests with different ones never share.
        texts: what it says, by message; what is asked stands last.
        sampled: whether its temperature is above 0.
    """

    line: int
    path: Literal["chat/completions", "completions"]
    body: dict[str, Any]
    salt: str
    texts: tuple[str, ...]
    sampled: bool


class _Message(BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = None

    def words(self) -> str:
        parts = self.content if isinstance(self.content, list) else [{"text": self.content or ""}]
        return " ".join(str(p.get("text", f"[{p.get('type')}]")) for p in parts)


class _Body(BaseModel):
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: Any = None
    text: Any = None  # beside messages it is an object of OpenAI's
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    cache_salt: str | None = None
    temperature: float | None = None


def read_log(path: Path, max_tokens: int, limit: int | None = None) -> list[Asked]:
    """The requests of a log, in order.

    A line is a body of ``chat/completions`` or ``completions``, a line of OpenAI's batch files
    (which has it under ``body``), or ``{"text": ...}``, which is asked in a chat.

    Args:
        max_tokens: longest answer of requests that name none.
        limit: read the first so many; None for all.

    Raises:
        ConfigError: a line is no request; says which and why.
    """
    asked: list[Asked] = []
    for line, record in islice(numbered(path), limit):
        given = record["body"] if isinstance(record.get("body"), dict) else record
        try:
            asked.append(_asked(line, given, _Body.model_validate(given), max_tokens))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path}:{line} {where}: {first['msg']}") from error
        except ValueError as error:
            raise ConfigError(f"{path}:{line} {error}") from error
    if not asked:
        raise ConfigError(f"{path} has no requests")
    return asked


def families(log: Sequence[Asked]) -> list[int]:
    """For each request the line of the first one that is made like it, often its own.

    Two are made alike if the shorter one has more than half of its runs of three words in common
    with the other, numbers apart: a form, a template, a conversation that went on.
    """
    first_with: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    found = []
    for asked in log:
        text = " ".join(asked.texts).lower()
        if not isinstance(asked.body.get("prompt"), list):  # token ids are no numbers
            text = re.sub(r"\d+", "0", text)
        words = re.findall(r"\w+", text)
        starts = range(max(1, len(words) - _RUN + 1))
        runs = {(asked.salt, *words[i : i + _RUN]) for i in starts}
        shared = Counter(line for run in runs for line in first_with.get(run, ()))
        shares = {line: n / min(sizes[line], len(runs)) for line, n in shared.items()}
        family = max(shares, key=shares.__getitem__, default=asked.line)
        if shares.get(family, 0) <= 0.5:
            family, sizes[asked.line] = asked.line, len(runs)
            for run in runs:
                first_with.setdefault(run, []).append(family)
        found.append(family)
    return found


def _asked(line: int, given: dict[str, Any], body: _Body, max_tokens: int) -> Asked:
    kept = {k: v for k, v in given.items() if k not in _LEFT_OUT and v is not None}
    kept["max_tokens"] = body.max_completion_tokens or body.max_tokens or max_tokens
    salt, sampled = body.cache_salt or "", bool(body.temperature)
    if body.messages is None and body.prompt is not None:
        return Asked(line, "completions", kept, salt, (_prompt_words(body.prompt),), sampled)
    kept.pop("prompt", None)
    if body.messages is None:
        if not isinstance(body.text, str) or not body.text.strip():
            raise ValueError(
                "has no messages, prompt or text, such as "
                '{"messages": [{"role": "user", "content": "..."}]}'
            )
        kept["messages"] = [{"role": "user", "content": body.text}]
        body.messages = [_Message(role="user", content=body.text)]
    texts = tuple(message.words() for message in body.messages)
    return Asked(line, "chat/completions", kept, salt, texts, sampled)


def _prompt_words(prompt: Any) -> str:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return " ".join(map(str, prompt))
    raise ValueError("needs a prompt of text, or of token ids; several are a line each")
