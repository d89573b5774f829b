"""Load on any server with OpenAI's chat API, and what its clients feel."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.errors import ConfigError

_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent.

    Attributes:
        concurrency: clients that each send the next request when theirs is answered.
        rate: requests a second instead, at random times (a Poisson process); None: by concurrency.
        max_tokens: longest answer, where a request does not say.
        ignore_eos: answers are all of that length; vLLM and this project know the field.
        timeout_s: for one request.
        seed: of the random times.

    Raises:
        ConfigError: nothing would ever be sent.
    """

    concurrency: int = 8
    rate: float | None = None
    max_tokens: int = 64
    ignore_eos: bool = False
    timeout_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or (self.rate is not None and self.rate <= 0):
            raise ConfigError("concurrency and rate must be positive")


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; seconds.

    Attributes:
        ttft: until the first text; None: there was none.
        gaps: between pieces of text.
        total: until the end.
        prompt_tokens, completion_tokens, cached_tokens: as the server counts them.
        engine_ttft: of `ttft`, from the engine's queue to its first token; None: the server is
            not this project's.
        error: what went wrong, or None.
        text: the answer.
    """

    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    engine_ttft: float | None = None
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


def client_of(
    url: str, key: str | None = None, timeout_s: float = 60.0, **options: Any
) -> httpx2.AsyncClient:
    """A client of a server's API; paths are relative to ``/v1``.

    Args:
        url: of the server, with or without ``/v1``.
        key: API key, or None.
        timeout_s: for one request.
        options: of the client.
    """
    return httpx2.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1") + "/v1",
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=timeout_s,
        **options,
    )


async def first_model(url: str, key: str | None = None) -> str:
    """What a server calls its first model. Raises ConfigError: it does not say."""
    try:
        async with client_of(url, key) as client:
            reply = await client.get("models")
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{url} does not say which model it has: {error}") from error


async def run_load(
    url: str,
    bodies: Sequence[dict[str, Any]],
    load: Load,
    model: str | None = None,
    key: str | None = None,
    on_done: Callable[[Sample], None] = lambda _: None,
) -> tuple[list[Sample], float]:
    """Send all requests; samples in their order, and the seconds it took.

    Args:
        url: of the server, with or without ``/v1``.
        bodies: of the requests.
        model: what the server calls it; None: the first it names.
        key: API key, or None.
        on_done: called with each sample.

    Raises:
        ConfigError: the server does not answer.
    """
    model = model or await first_model(url, key)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=load.concurrency)
    async with client_of(url, key, load.timeout_s, limits=limits) as client:
        start = time.perf_counter()

        async def one(body: dict[str, Any]) -> Sample:
            whole = {"max_tokens": load.max_tokens, "temperature": 0, **body, "model": model}
            if load.ignore_eos:
                whole["ignore_eos"] = True
            sample = await ask(client, whole)
            on_done(sample)
            return sample

        if load.rate is not None:
            samples = await _by_rate(one, bodies, load.rate, load.seed)
        else:
            samples = await _by_concurrency(one, bodies, load.concurrency)
        return samples, time.perf_counter() - start


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Percentiles in seconds, throughput, cached tokens, errors."""
    good = [s for s in samples if s.error is None]
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.error is not None:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    prompt = sum(s.prompt_tokens for s in good)
    completion = sum(s.completion_tokens for s in good)
    cached = sum(s.cached_tokens for s in good)
    return {
        "requests": len(samples),
        "completed": len(good),
        "errors": errors,
        "seconds": seconds,
        "requests_per_s": len(good) / seconds if seconds else 0.0,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "completion_tokens_per_s": completion / seconds if seconds else 0.0,
        "cached_tokens": cached,
        "cached_share": cached / prompt if prompt else 0.0,
        "ttft_s": _spread([s.ttft for s in good if s.ttft is not None]),
        "inter_token_s": _spread([gap for s in good for gap in s.gaps]),
        "e2e_s": _spread([s.total for s in good]),
    }


async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> Sample:
    """Stream the answer to a chat; what goes wrong is in the sample."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sample = Sample()
    start = last = time.perf_counter()
    finished = False
    try:
        async with client.stream("POST", "chat/completions", json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                sample.error = f"status {reply.status_code}"
                return sample
            async for line in reply.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    finished = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    sample.error = str(event["error"].get("type", "error"))
                    return sample
                _count(sample, event.get("usage"))
                if "kvshare" in event:
                    sample.engine_ttft = event["kvshare"]["seconds"]["ttft"]
                for choice in event["choices"]:
                    text = choice["delta"].get("content")
                    if text:
                        now = time.perf_counter()
                        if sample.ttft is None:
                            sample.ttft = now - start
                        else:
                            sample.gaps.append(now - last)
                        last = now
                        sample.text += text
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        sample.error = type(error).__name__
        return sample
    if not finished:
        sample.error = "cut off"
    sample.total = time.perf_counter() - start
    return sample


def _count(sample: Sample, usage: dict[str, Any] | None) -> None:
    if usage:
        sample.prompt_tokens = usage["prompt_tokens"]
        sample.completion_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        sample.cached_tokens = details.get("cached_tokens") or 0


async def _by_rate(
    one: Callable[[dict[str, Any]], Any], bodies: Sequence[dict[str, Any]], rate: float, seed: int
) -> list[Sample]:
    draw = random.Random(seed)
    tasks = []
    due = time.perf_counter()
    for body in bodies:
        # By the clock, not from the last one: what is late must not make the load smaller.
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(body)))
        due += draw.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _by_concurrency(
    one: Callable[[dict[str, Any]], Any], bodies: Sequence[dict[str, Any]], concurrency: int
) -> list[Sample]:
    samples: dict[int, Sample] = {}
    left = iter(enumerate(bodies))

    async def client() -> None:
        for i, body in left:
            samples[i] = await one(body)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [samples[i] for i in range(len(bodies))]


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(values, _PERCENTILES)
    spread = {f"p{p}": float(v) for p, v in zip(_PERCENTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **spread, "max": max(values)}
