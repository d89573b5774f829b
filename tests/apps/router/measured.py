"""What a router gains and costs: `python tests/apps/router/measured.py`, some minutes.

Starts four servers of SmolLM2 with a thread each and a router before them. Each way to send a
stream of requests has a `cache_salt` of its own, so that it begins with empty stores.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np

from kvshare_mm.apps.bench.serve import Sample, ask, client_of
from kvshare_mm.apps.router.memory import Memory
from kvshare_mm.apps.router.plan import Standing, choose
from kvshare_mm.apps.router.prompt import prompt_of

_LETTERS = "bcdfglmnprst"
_NUM_REPLICAS = 4


def families(count: int, each: int, words: int, seed: int = 0) -> list[str]:
    """Prompts of templates that have nothing in common, each with its own numbers; mixed."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        known = ["".join(draw.choice(_LETTERS) + draw.choice("aeiou") for _ in range(2))
                 for _ in range(60)]  # fmt: skip
        template = " ".join(
            "{}" if i % 30 == 10 else draw.choice(known) + "." * (i % 9 == 8) for i in range(words)
        )
        texts += [re.sub(r"\{\}", lambda _: str(draw.randrange(1000)), template)
                  for _ in range(each)]  # fmt: skip
    draw.shuffle(texts)
    return texts


def started(*words: str) -> tuple[str, subprocess.Popen[str]]:
    """A `kvshare` command and its URL, ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvshare_mm.apps.cli", *words, "--port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on (http://\S+)", line):
            # Its log is read on, or it would wait for that.
            threading.Thread(target=deque, args=(process.stderr, 0), daemon=True).start()
            while True:
                try:
                    if httpx2.get(f"{found[1]}/health").status_code == 200:
                        return found[1], process
                except httpx2.HTTPError:
                    pass
                time.sleep(0.2)
    raise SystemExit(f"{words} ended with {process.wait()}")


async def sent(
    bodies: list[dict[str, Any]], url_of: Callable[[int], str], concurrency: int
) -> list[Sample]:
    """Send requests in their order, so many at a time; the i-th to `url_of(i)`."""
    left, samples = iter(enumerate(bodies)), {}

    async def client() -> None:
        for i, body in left:
            async with client_of(url_of(i)) as http:
                samples[i] = await ask(http, {"model": "smollm2", "temperature": 0, **body})

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [samples[i] for i in range(len(bodies))]


def bodies(texts: list[str], salt: str, tokens: int = 4, **ours: Any) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "cache_salt": salt,
         "kvshare": ours}
        for text in texts
    ]  # fmt: skip


def told(name: str, samples: list[Sample]) -> tuple[int, ...]:
    """Tokens by origin, printed."""
    assert all(s.error is None for s in samples), Counter(s.error for s in samples)
    tokens = [sum(s.reuse[o] for s in samples) for o in ("exact", "reused", "recomputed")]
    share = 1 - tokens[2] / sum(tokens)
    print(f"{name:28} exact {tokens[0]:6} reused {tokens[1]:6} computed {tokens[2]:6}"
          f" shared {share:.1%}", flush=True)  # fmt: skip
    return tuple(tokens)


def decisions(known: int = 100_000, words: int = 400) -> None:
    """Seconds to read a prompt and choose, among so many known ones; each is then known too."""
    memory, draw, times = Memory(known), random.Random(0), []
    texts = families(known // 100, 100, words) + families(20, 100, words, seed=1)
    start = time.perf_counter()
    for i, text in enumerate(texts):
        begun = time.perf_counter()
        prompt = prompt_of({"messages": [{"role": "user", "content": text}]}, "")
        assert prompt is not None
        if i >= known:
            shares = memory.shares(prompt, range(_NUM_REPLICAS))
            choose(len(prompt.words), [Standing(r, s) for r, s in shares.items()], draw)
            times.append(time.perf_counter() - begun)
        memory.add(prompt, draw.randrange(_NUM_REPLICAS))
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1e3
    print(f"{len(memory)} known after {time.perf_counter() - start:.0f} s,"
          f" {memory.num_bytes / len(memory):.0f} bytes each; decision p50 {p50:.2f} ms,"
          f" p99 {p99:.2f} ms, longest {max(times) * 1e3:.2f} ms")  # fmt: skip


def main() -> None:
    decisions()
    running = [started("serve", "smollm2", "--embedder", "none") for _ in range(_NUM_REPLICAS)]
    urls = [url for url, _ in running]
    router, process = started("route", "--replicas", ",".join(urls))
    running.append((router, process))

    def stream(
        name: str, url_of: Callable[[int], str], at_a_time: int, **ours: Any
    ) -> list[Sample]:
        asked = bodies(texts, f"{name} {at_a_time}", **ours)
        samples = asyncio.run(sent(asked, url_of, at_a_time))
        told(f"{name}, {at_a_time} at a time", samples)
        return samples

    try:
        texts = families(12, 10, 80)
        for at_a_time in (1, 8):
            one = stream("one process", lambda _: urls[0], at_a_time)
            routed = stream("router", lambda _: router, at_a_time)
            stream("round robin", lambda i: urls[i % _NUM_REPLICAS], at_a_time)
            alike = [a.text == b.text for a, b in zip(one, routed, strict=True)
                     if [a.reuse[o] for o in ("exact", "reused", "recomputed")]
                     == [b.reuse[o] for o in ("exact", "reused", "recomputed")]]  # fmt: skip
            print(f"  of {len(alike)} with equal plans {sum(alike)} have equal answers")
        texts = families(12, 2, 80, seed=2) * 2
        off = stream("one process, reuse off", lambda _: urls[0], 4, reuse="off")
        exact = stream("router, exact reuse", lambda _: router, 4, reuse="exact")
        print(f"  {sum(a.text == b.text for a, b in zip(off, exact, strict=True))} of {len(off)}"
              " answers are those without reuse")  # fmt: skip
        print([line for line in httpx2.get(f"{router}/metrics").text.splitlines()
               if line.startswith("kvshare_router_requests_total")])  # fmt: skip
        asyncio.run(killed(router, running[1][1]))
    finally:
        for _, each in running:
            each.kill()


async def killed(router: str, victim: subprocess.Popen[str]) -> None:
    """Kill a replica while sixteen clients stream."""
    texts = families(12, 10, 80, seed=3)

    async def kill() -> None:
        await asyncio.sleep(8)
        os.kill(victim.pid, signal.SIGKILL)

    killing = asyncio.create_task(kill())
    samples = await sent(bodies(texts, "killed", 24), lambda _: router, 16)
    await killing
    failed = [s for s in samples if s.error]
    print(f"kill -9: {len(samples)} requests, {len(failed)} failed,"
          f" {sum(s.ttft is None for s in failed)} of them before their first text")  # fmt: skip
    print([line for line in httpx2.get(f"{router}/metrics").text.splitlines()
           if line.startswith(("kvshare_router_lost_total", "kvshare_router_up"))])  # fmt: skip


if __name__ == "__main__":
    main()
