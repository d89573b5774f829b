"""Replicas that share a store and Milvus, and a router before them: each a process to be killed."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from kvshare_mm.apps.bench.serve import Sample, ask, client_of
from kvshare_mm.apps.elsewhere import reusing

from ...remote_servers import MilvusServer, Server, SharedServer, free_port, shared_server

_START_S = 300.0  # the first on a machine converts the model


class Command(Server):
    """A `kvshare` command that serves HTTP."""

    def __init__(self, log: Path, name: str, *words: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "kvshare_mm.apps.cli", name, "--port", str(port), *words]
        super().__init__(command, port, log)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while self.status() != httpx2.codes.OK:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"{self._command} did not start")
            time.sleep(0.1)

    def status(self) -> int:
        """What its /health says; 0: nothing."""
        try:
            return httpx2.get(f"{self.url}/health", timeout=5).status_code
        except httpx2.HTTPError:
            return 0

    def metric(self, line: str) -> float:
        """The value of a line of /metrics that begins so; 0 if there is none."""
        for found in httpx2.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if found.startswith(line):
                return float(found.rsplit(" ", 1)[1])
        return 0.0

    def events(self) -> dict[str, int]:
        """What happened to its donors, by name."""
        begin = 'kvshare:donor_events_total{event="'
        lines = httpx2.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        found = [line[len(begin) :].split('"', 1) for line in lines if line.startswith(begin)]
        return {name: int(float(rest.rsplit(" ", 1)[1])) for name, rest in found}


@dataclass(frozen=True)
class Cluster:
    """All of it, running."""

    shared: SharedServer
    milvus: MilvusServer
    replicas: list[Command]
    router: Command


@contextmanager
def routed(
    folder: Path, serve: Sequence[Sequence[str]], router_options: Sequence[str] = ()
) -> Iterator[tuple[list[Command], Command]]:
    """Replicas, each by the words of its command, and a router before them; logs in `folder`."""
    started: list[Server] = []

    def replica(number: int, words: Sequence[str]) -> Command:
        log = folder / f"replica-{number}.log"
        started.append(Command(log, "serve", "--served-model-name", "m", *words))
        return started[-1]

    try:
        with ThreadPoolExecutor(len(serve)) as pool:
            replicas = list(pool.map(replica, range(len(serve)), serve))
        urls = ",".join(each.url for each in replicas)
        words = ("route", "--replicas", urls, *router_options)
        started.append(router := Command(folder / "router.log", *words))
        yield replicas, router
    finally:
        for each in started:
            each.go_on()
            each.kill()


@contextmanager
def cluster(
    folder: Path,
    num_replicas: int,
    *options: str,
    model: str,
    kind: str = "redis",
    router_options: Sequence[str] = (),
) -> Iterator[Cluster]:
    """Start all, with options of replicas, which share a store of a kind; logs and stores of their
    own lie in `folder`."""
    with shared_server(kind) as store, ExitStack() as stack:
        milvus = MilvusServer(folder / "milvus")
        stack.callback(milvus.close)
        shared = ("--shared-store", store.url, "--index-uri", milvus.url, "--embedder", "none")
        stores = [("--store-dir", str(folder / f"store-{i}")) for i in range(num_replicas)]
        serve = [(model, *shared, *store, *options) for store in stores]
        replicas, router = stack.enter_context(routed(folder, serve, router_options))
        yield Cluster(store, milvus, replicas, router)


def bodies(texts: Sequence[str], salt: str, tokens: int = 6, **ours: Any) -> list[dict[str, Any]]:
    """Chats of these texts; `ours` are options of KVShare."""
    return [
        {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "cache_salt": salt,
            **reusing(ours),
        }
        for text in texts
    ]


async def ask_whole(client: httpx2.AsyncClient, body: dict[str, Any]) -> Sample:
    """The answer to a chat in one piece: in a stream vLLM says nothing of reuse."""
    reply = await client.post("chat/completions", json=body)
    if reply.status_code != httpx2.codes.OK:
        return Sample(error=f"status {reply.status_code}")
    said = reply.json()
    reuse = said.get("kvshare") or said["kv_transfer_params"]["kvshare"]
    return Sample(reuse=reuse, text=said["choices"][0]["message"]["content"])


def sent(
    asked: Sequence[dict[str, Any]],
    url_of: Callable[[int], str],
    concurrency: int = 1,
    by: Callable[[httpx2.AsyncClient, dict[str, Any]], Awaitable[Sample]] = ask,
) -> list[Sample]:
    """Answers to requests that are sent in their order, so many at a time, the i-th to
    `url_of(i)`."""
    samples: dict[int, Sample] = {}
    left = iter(enumerate(asked))

    async def client() -> None:
        for i, body in left:
            async with client_of(url_of(i)) as http:
                samples[i] = await by(http, body)

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(concurrency)))

    asyncio.run(clients())
    return [samples[i] for i in range(len(asked))]


def plan(sample: Sample) -> list[int]:
    """Tokens of a prompt by where their KV came from: exact, reused, computed."""
    return [sample.reuse[origin] for origin in ("exact", "reused", "recomputed")]


def shared_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of prompts that were not computed."""
    return sum(sum(plan(sample)[:2]) for sample in samples)
