"""What a running server reuses under load: the part that general load tools do not see."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from rich.progress import Progress

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.elsewhere import api_of
from kvshare_mm.errors import ConfigError

_ORIGINS = ("exact", "reused", "recomputed")


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; seconds.

    Attributes:
        ttft: until the first text; None: there was none.
        reuse: what the server said of it, or nothing: its field ``kvshare``.
        error: what went wrong, or None.
        text: the answer.
    """

    ttft: float | None = None
    reuse: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    text: str = ""


def read_requests(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Bodies of requests from JSON Lines: ``{"text": ...}``, or any body with ``messages``.

    Raises:
        ConfigError: the file cannot be used; says which line.
    """
    bodies = []
    for i, record in enumerate(read_jsonl(path, limit=limit), 1):
        if isinstance(record.get("messages"), list):
            bodies.append(record)
        elif isinstance(record.get("text"), str):
            bodies.append({"messages": [{"role": "user", "content": record["text"]}]})
        else:
            raise ConfigError(f"request {i} of {path} has neither text nor messages")
    return bodies


def client_of(url: str, key: str | None = None, timeout_s: float = 600.0) -> httpx2.AsyncClient:
    """A client of a server's API; paths are relative to ``/v1``.

    Args:
        url: of the server, with or without ``/v1``.
        key: API key, or None.
        timeout_s: for one request.
    """
    return httpx2.AsyncClient(
        **api_of(url, key), timeout=timeout_s, limits=httpx2.Limits(max_connections=None)
    )


async def first_model(client: httpx2.AsyncClient) -> str:
    """What a server calls its first model. Raises ConfigError: it does not say."""
    try:
        reply = await client.get("models")
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{client.base_url} does not say which model it has: {error}") from error


async def load(
    url: str,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    model: str | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Send all requests to a server, so many at a time.

    Args:
        url: of the server, with or without ``/v1``.
        model: what the server calls it; None: the first it names.
        key: API key, or None.

    Returns:
        `summary` of what came back, and what was asked, JSON-ready.

    Raises:
        ConfigError: the server does not answer, or says nothing of reuse.
    """
    async with client_of(url, key) as client:
        model = model or await first_model(client)
        with Progress(transient=True) as bar:
            task = bar.add_task("Asking", total=len(bodies))
            whole = [{"temperature": 0, **body, "model": model} for body in bodies]
            samples = await run_load(client, whole, concurrency, lambda _: bar.advance(task))
    return {"kind": "serve", "model": model, "concurrency": concurrency, **summary(samples)}


async def run_load(
    client: httpx2.AsyncClient,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    on_done: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Send all requests, so many at a time; samples in their order."""
    samples: dict[int, Sample] = {}
    left = iter(enumerate(bodies))

    async def one_by_one() -> None:
        for i, body in left:
            samples[i] = await ask(client, body)
            on_done(samples[i])

    await asyncio.gather(*(one_by_one() for _ in range(concurrency)))
    return [samples[i] for i in range(len(bodies))]


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Errors by kind, and of what was answered: where prompts' KV came from, and first tokens.

    Raises:
        ConfigError: answers say nothing of reuse: the server is not this project's.
    """
    good = [s for s in samples if s.error is None]
    told = [s.reuse for s in good]
    if not all(told):
        raise ConfigError("the server says nothing of reuse: it is not this project's")
    tokens = {origin: sum(t[origin] for t in told) for origin in _ORIGINS}
    prompt = sum(tokens.values())
    ttft = [s.ttft for s in good if s.ttft is not None]
    return {
        "requests": len(samples),
        "completed": len(good),
        "errors": dict(Counter(s.error for s in samples if s.error is not None)),
        "prompt_tokens": prompt,
        "shares": {origin: count / max(1, prompt) for origin, count in tokens.items()},
        "declined": dict(Counter(t["declined"] for t in told if t["declined"])),
        "ttft_s": spread(ttft, 50, 90, 99),
        "engine_ttft_s": spread([t["seconds"]["ttft"] for t in told], 50, 90, 99),
    }


async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> Sample:
    """Stream the answer to a chat; what goes wrong is in the sample."""
    sample = Sample(error="cut off")
    start = time.perf_counter()
    try:
        async with client.stream(
            "POST", "chat/completions", json={**body, "stream": True}
        ) as reply:
            if reply.status_code != httpx2.codes.OK:
                await reply.aread()
                sample.error = f"status {reply.status_code}"
                return sample
            async for line in reply.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    sample.error = None
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        sample.error = str(event["error"].get("type", "error"))
                        return sample
                    sample.reuse = event.get("kvshare", sample.reuse)
                    text = "".join(c["delta"].get("content") or "" for c in event["choices"])
                    if text and sample.ttft is None:
                        sample.ttft = time.perf_counter() - start
                    sample.text += text
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        sample.error = type(error).__name__
    return sample
