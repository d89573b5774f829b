"""A server with KVShare in it, this project's or vLLM's, as the desk asks an engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from PIL import Image

from kvshare_mm.apps.elsewhere import api_of, reusing, tells_of_reuse
from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import ConfigError, InvalidRequestError, KVShareError, QueueFullError
from kvshare_mm.modalities.seen import SeenMedium
from kvshare_mm.outputs import MediaUse, Provenance, RequestMetrics, RequestOutput, StreamChunk
from kvshare_mm.reuse.admin import CacheAdmin
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import Modality

_TIMEOUT_S, _CLOSE_S = 600.0, 5.0
_MOST_TOKENS = 1 << 22
_TEXT_HEAD = 300  # characters of an error that is shown
# What a server that is none, or goes away, makes of an answer.
_BROKEN = (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True, slots=True)
class Spec:
    """A request as the endpoint gets it.

    Attributes:
        body: of it.
        stream: stands for its prompt's tokens, which only the endpoint knows.
    """

    body: dict[str, Any]
    stream: Sequence[int] = ()


class Endpoint:
    """Answers by OpenAI's API.

    Args:
        url: with or without ``/v1``.
        model: what the endpoint calls it; None: the first it names.
        key: API key, or None.

    Raises:
        ConfigError: it does not answer, refuses the key, or has neither the model nor KVShare.
    """

    #: Stored requests and tokens are the endpoint's own.
    tokenizer = None
    has_cache = False
    healthy = True
    stuck_s = 0.0

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        try:
            if httpx2.URL(url).userinfo:
                raise ConfigError("--url has a password in it; a key is given by --api-key")
            options = {**api_of(url, key), "timeout": _TIMEOUT_S}
            with httpx2.Client(**options) as client:
                served = [str(each["id"]) for each in _json(client.get("models"))["data"]]
                self.name = model or served[0]
                if self.name not in served:
                    raise ConfigError(f"{url} has no model {model!r}, but {', '.join(served)}")
                said = _json(self._hello(client, "Hello"))
                self.modalities = frozenset({Modality.IMAGE} if self._sees(client) else ())
        except ConfigError:
            raise
        except _BROKEN as error:
            raise ConfigError(f"{url} does not answer as a server: {error}") from error
        if not tells_of_reuse(said):
            raise ConfigError(f"{url} says nothing of reuse: there is no KVShare in it")
        self._client = httpx2.AsyncClient(**options)
        self._loop: asyncio.AbstractEventLoop | None = None

    def namespace(self, cache_salt: str | None = None) -> str:
        """What keeps requests apart there."""
        return cache_salt or ""

    def read(
        self,
        prompt: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Spec:
        """A chat as the endpoint gets it; nothing is sent."""
        params, options = params or SamplingParams(), options or RequestOptions()
        how = {"reuse": options.reuse, "store": options.store}
        body = self._body(
            [{**message, "content": _content(message["content"])} for message in prompt],
            how,
            options.cache_salt or "",
            params.max_tokens or 1,
        )
        return Spec({**body, "stream": True, "stream_options": {"include_usage": True}})

    @property
    def cache(self) -> CacheAdmin:
        """Raises ConfigError: see `has_cache`."""
        raise ConfigError("cache: the donors are the endpoint's own")

    async def astream(self, prompt: Spec) -> AsyncGenerator[StreamChunk]:
        """Chunks of an answer as they come; the last has the output.

        Its token ids stand for their number alone.

        Raises:
            InvalidRequestError: the endpoint refuses the request.
            QueueFullError: it is too busy.
            KVShareError: it broke off.
        """
        self._loop = asyncio.get_running_loop()
        start = time.perf_counter()
        ttft: float | None = None
        text, ended, reason = "", False, "stop"
        usage: Mapping[str, Any] = {}
        told: Mapping[str, Any] = {}
        try:
            async with self._client.stream("POST", "chat/completions", json=prompt.body) as reply:
                if reply.status_code != httpx2.codes.OK:
                    await reply.aread()
                    raise _refusal(reply)
                async for line in reply.aiter_lines():
                    name, _, data = line.partition(":")
                    if name != "data" or (ended := data.strip() == "[DONE]"):
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise InvalidRequestError(_message(data))
                    usage, told = event.get("usage") or usage, event.get("kvshare") or told
                    for choice in event["choices"]:
                        piece = (choice.get("delta") or {}).get("content") or ""
                        reason = choice.get("finish_reason") or reason
                        if not piece:
                            continue
                        if ttft is None:
                            ttft = time.perf_counter() - start
                        text += piece
                        yield StreamChunk(piece)
            if not ended:
                raise ValueError("the answer was cut off")
            total = time.perf_counter() - start
            output = _output(text, reason, usage, told, total if ttft is None else ttft, total)
        except KVShareError:
            raise
        except _BROKEN as error:
            raise KVShareError(f"the endpoint broke off: {type(error).__name__}") from error
        yield StreamChunk("", output=output)

    def similar_media(
        self, part: Mapping[str, Any], k: int = 5, cache_salt: str | None = None
    ) -> list[SeenMedium]:
        """Raises ConfigError: it is not known what an endpoint has seen."""
        raise ConfigError("an endpoint does not tell which pictures are alike")

    def stats(self) -> None:
        """An endpoint has counters of its own."""

    def flush(self, timeout_s: float | None = None) -> bool:
        """Nothing is kept here."""
        return True

    def close(self) -> None:
        """Let go of its connections."""
        if self._loop is not None and self._loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop)
            closing.result(_CLOSE_S)

    def _body(
        self, messages: Sequence[Any], how: Mapping[str, Any], salt: str, max_tokens: int
    ) -> dict[str, Any]:
        return {
            "model": self.name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "cache_salt": salt,
            **reusing(how),
        }

    def _hello(self, client: httpx2.Client, content: Any) -> httpx2.Response:
        message = {"role": "user", "content": content}
        body = self._body([message], {"reuse": "off", "store": False}, uuid.uuid4().hex, 1)
        return client.post("chat/completions", json=body)

    def _sees(self, client: httpx2.Client) -> bool:
        """Whether the model takes pictures: it is shown one."""
        file = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(file, "PNG")
        picture = _content([{"type": "image", "image": file.getvalue()}])
        return self._hello(client, picture).status_code == httpx2.codes.OK


def _content(content: Any) -> Any:
    """A message's content with files as base64."""
    if isinstance(content, str):
        return content
    return [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part["type"] == "image":
        data = base64.b64encode(part["image"]).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    if part["type"] == "audio":
        data = base64.b64encode(part["audio"]).decode()
        kind = "wav" if part["audio"].startswith(b"RIFF") else "mp3"
        return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    return part


def _output(
    text: str,
    reason: str,
    usage: Mapping[str, Any],
    told: Mapping[str, Any],
    ttft: float,
    total: float,
) -> RequestOutput:
    prompt, answer = (
        min(int(usage[name]), _MOST_TOKENS) for name in ("prompt_tokens", "completion_tokens")
    )
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return RequestOutput(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=(0,) * prompt,
        text=text,
        token_ids=(0,) * answer,
        finish_reason="length" if reason == "length" else "stop",
        # vLLM tells a stream's reader only how much was reused, not how.
        provenance=_provenance(told)
        if told
        else Provenance(reused=cached, recomputed=prompt - cached),
        metrics=RequestMetrics(ttft=ttft, total=total),
    )


def _provenance(told: Mapping[str, Any]) -> Provenance:
    media = tuple(
        MediaUse("image", 0, 0, str(use["content_hash"]), str(use["label"]), "encoder")
        for use in told.get("media") or ()
    )
    return Provenance(
        exact=int(told["exact"]),
        reused=int(told["reused"]),
        recomputed=int(told["recomputed"]),
        donors=tuple(map(str, told.get("donors") or ())),
        similarity=float(told.get("similarity") or 0),
        declined=told.get("declined"),
        fallback=told.get("fallback"),
        media=media,
    )


def _json(reply: httpx2.Response) -> dict[str, Any]:
    if reply.status_code != httpx2.codes.OK:
        raise ValueError(f"status {reply.status_code}: {_message(reply.text)}")
    return dict(reply.json())


def _refusal(reply: httpx2.Response) -> KVShareError:
    said = f"the endpoint says: {_message(reply.text)}"
    if reply.status_code in (429, 503):
        return QueueFullError(said)
    return InvalidRequestError(said) if reply.status_code < 500 else KVShareError(said)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])[:_TEXT_HEAD]
    except (ValueError, KeyError, TypeError):
        return text[:_TEXT_HEAD]
