"""Who answers: this process, or a running server that has KVShare in it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx2
from pydantic import ValidationError

from kvshare_mm.apps.audit.log import Asked
from kvshare_mm.apps.elsewhere import api_of, reusing, tells_of_reuse
from kvshare_mm.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from kvshare_mm.llm import KVShare
    from kvshare_mm.sampling import SamplingParams

How = Mapping[str, Any]
"""Fields of a request's ``kvshare``: how it reuses, and whether it is stored."""

_TIMEOUT_S, _LONGEST_WAIT_S, _ATTEMPTS, _FLUSH_S = 600.0, 60.0, 6, 30.0
_MOST_MEDIA = 8
_GOES_ON = "with --json or --html the same command goes on from there"
# What a server that is none, or goes away, makes of an answer.
_BROKEN = (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer and what it took.

    Attributes:
        text: the answer.
        cut: whether it reached its longest length.
        ttft: seconds to the first token, as the one who asks sees it.
        prompt: tokens of the prompt.
        computed: those that the model computed.
    """

    text: str
    cut: bool
    ttft: float
    prompt: int
    computed: int


class Refused(Exception):
    """A request that cannot be served, in the words of who refused it."""


class Server(Protocol):
    """Answers requests one at a time."""

    name: str

    def ask(self, asked: Asked, how: How, salt: str) -> Reply:
        """Answer greedily. Raises Refused; ConfigError if it makes no sense to go on."""
        ...

    def close(self) -> None:
        """Let go of what answers."""
        ...


class InProcess:
    """The native engine in this process.

    Args:
        llm: opened with ``local_media=False``: a log may hold strangers' paths. It is closed, too.

    Raises:
        ConfigError: the package's server parts, which read requests, are not installed.
    """

    def __init__(self, llm: KVShare) -> None:
        self.name = llm.config.model
        self._llm = llm
        self.close = llm.close
        try:
            import kvshare_mm.apps.server.schema  # noqa: F401
        except ImportError as error:
            llm.close()
            raise ConfigError(
                f"requests are read as the server does: pip install 'kvshare-mm[server]' ({error})"
            ) from error

    def ask(self, asked: Asked, how: How, salt: str) -> Reply:
        from kvshare_mm.apps.server.errors import ApiError
        from kvshare_mm.config import RequestOptions

        try:
            options = RequestOptions(cache_salt=salt, **how)
            prompt, params, tools = self._read(asked)
            *_, last = self._llm.stream(prompt, params, options, **tools)
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (InvalidRequestError, ApiError) as error:
            raise Refused(str(error)) from error
        # What the next request may reuse does not depend on how fast this machine stores.
        self._llm.flush(_FLUSH_S)
        done = last.output
        if done is None:
            raise RuntimeError("the stream ended without an output")
        size, computed = len(done.prompt_token_ids), done.provenance.recomputed
        return Reply(done.text, done.finish_reason == "length", done.metrics.ttft, size, computed)

    def _read(self, asked: Asked) -> tuple[Any, SamplingParams, dict[str, Any]]:
        """A prompt or messages, how they are answered, and what may be called: what the server
        would make of it."""
        from kvshare_mm.apps.server.media import resolved
        from kvshare_mm.apps.server.schema import ChatBody, CompletionBody
        from kvshare_mm.modalities.fetch import MediaFetcher

        body = {**asked.body, "temperature": 0}
        if asked.path == "completions":
            whole = CompletionBody.model_validate(body)
            whole.check(self.name)
            return whole.prompts[0], whole.params(whole.max_tokens, None, 0), {}
        chat = ChatBody.model_validate(body)
        chat.check(self.name)
        messages = [message.model_dump() for message in chat.messages]
        read = asyncio.run(resolved(messages, MediaFetcher(), _MOST_MEDIA))
        return read, chat.params(chat.limit, None, 0), chat.offered


class Remote:
    """A running server, KVShare's own or vLLM's with KVShare in it.

    Args:
        url: with or without ``/v1``.
        model: what the server calls it; None: the first it names.
        key: API key, or None.

    Raises:
        ConfigError: it does not answer, refuses the key, or has neither the model nor KVShare.
    """

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        try:
            if httpx2.URL(url).userinfo:  # reports tell the URL
                raise ConfigError("--url has a password in it; a key is given by --api-key")
            self._client = httpx2.Client(**api_of(url, key), timeout=_TIMEOUT_S)
            self.close = self._client.close
            served = [str(each["id"]) for each in self._json("GET", "models")["data"]]
            self.name = model or served[0]
            if self.name not in served:
                raise ConfigError(f"{url} has no model {model!r}, but {', '.join(served)}")
            hello = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            asked = self._body(hello, {"reuse": "off", "store": False}, "audit")
            said = self._json("POST", "chat/completions", json=asked)
        except ConfigError:
            raise
        except _BROKEN as error:
            raise ConfigError(f"{url} does not answer as a server: {error}") from error
        if not tells_of_reuse(said):
            raise ConfigError(f"{url} says nothing of reuse: there is no KVShare in it")

    def ask(self, asked: Asked, how: How, salt: str) -> Reply:
        body = {**self._body(asked.body, how, salt), "stream": True}
        body["stream_options"] = {"include_usage": True}
        for attempt in range(_ATTEMPTS):
            try:
                reply = self._stream(asked.path, body)
            except _BROKEN as error:
                what = f"{type(error).__name__} {error}; {_GOES_ON}"
                raise ConfigError(f"the server broke off at line {asked.line}: {what}") from error
            if isinstance(reply, Reply):
                return reply
            time.sleep(min(reply * (attempt + 1), _LONGEST_WAIT_S))
        raise ConfigError(f"the server is too busy; {_GOES_ON}")

    def _body(self, body: Mapping[str, Any], how: How, salt: str) -> dict[str, Any]:
        return {**body, **reusing(how), "cache_salt": salt, "model": self.name, "temperature": 0}

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        reply = self._client.request(method, path, **options)
        if reply.status_code != 200:
            raise ValueError(f"status {reply.status_code}: {_message(reply.text)}")
        return dict(reply.json())

    def _stream(self, path: str, body: dict[str, Any]) -> Reply | float:
        """The answer; or seconds to wait before the next attempt."""
        start = time.perf_counter()
        ttft: float | None = None
        text, cut, ended = "", False, False
        usage: dict[str, Any] = {}
        with self._client.stream("POST", path, json=body) as reply:
            if reply.status_code in (429, 503):
                return float(reply.headers.get("Retry-After", 1))
            if reply.status_code != 200:
                reply.read()
                raise Refused(_message(reply.text))
            for line in reply.iter_lines():
                name, _, data = line.partition(":")
                if name != "data" or (ended := data.strip() == "[DONE]"):
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise Refused(_message(data))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    delta = choice.get("delta") or {}
                    piece = choice.get("text") or delta.get("content") or ""
                    for call in delta.get("tool_calls") or ():
                        piece += "".join(str(part) for part in call["function"].values() if part)
                    if piece and ttft is None:
                        ttft = time.perf_counter() - start
                    text += piece
                    cut = cut or choice.get("finish_reason") == "length"
        if not ended:
            raise ValueError("the answer was cut off")
        prompt = int(usage["prompt_tokens"])
        cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        ttft = time.perf_counter() - start if ttft is None else ttft
        return Reply(text, cut, ttft, prompt, prompt - cached)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
