"""What a router gains and costs: ``python -m tests.apps.router.measured``, some minutes.

Starts servers of SmolLM2 with a thread each and a router before them. Each way to send a stream of
requests has a `cache_salt` of its own, so that it begins with empty stores. ``KVSHARE_REPLICAS``
says how many (4), ``KVSHARE_ENGINE=vllm`` which engine, ``KVSHARE_EACH`` how many requests of each
template (10), ``KVSHARE_KILLS`` how often one is killed (1), ``KVSHARE_KNOWN`` among how many known
requests a decision is timed (100,000; 0: not at all).
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import numpy as np

from kvshare_mm.apps.bench.serve import Sample
from kvshare_mm.apps.router.memory import Memory
from kvshare_mm.apps.router.plan import Standing, choose
from kvshare_mm.apps.router.prompt import prompt_of

from .cluster import Command, ask_whole, bodies, plan, routed, sent

_REPLICAS = int(os.environ.get("KVSHARE_REPLICAS", "4"))
_EACH = int(os.environ.get("KVSHARE_EACH", "10"))
_KILLS = int(os.environ.get("KVSHARE_KILLS", "1"))
_KNOWN = int(os.environ.get("KVSHARE_KNOWN", "100000"))
_SERVE = {
    "native": ("smollm2", "--embedder", "none"),
    "vllm": ("smollm2", "--engine", "vllm", "--max-model-len", "1024", "--", "--enforce-eager"),
}[os.environ.get("KVSHARE_ENGINE", "native")]
_LETTERS = "bcdfglmnprst"


def families(count: int, each: int, words: int, seed: int = 0) -> list[str]:
    """Prompts of templates that have nothing in common, each with its own numbers; mixed."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        template = _template(draw, words)
        texts += [_filled(template, draw) for _ in range(each)]
    draw.shuffle(texts)
    return texts


def _template(draw: random.Random, words: int) -> str:
    known = ["".join(draw.choice(_LETTERS) + draw.choice("aeiou") for _ in range(2))
             for _ in range(60)]  # fmt: skip
    return " ".join(
        "{}" if i % 30 == 10 else draw.choice(known) + "." * (i % 9 == 8) for i in range(words)
    )


def _filled(template: str, draw: random.Random) -> str:
    return re.sub(r"\{\}", lambda _: str(draw.randrange(1000)), template)


def told(name: str, samples: Sequence[Sample]) -> None:
    """Print tokens by origin."""
    assert all(s.error is None for s in samples), Counter(s.error for s in samples)
    exact, reused, computed = np.sum([plan(s) for s in samples], axis=0)
    share = 1 - computed / (exact + reused + computed)
    print(f"{name:28} exact {exact:6} reused {reused:6} computed {computed:6} shared {share:.1%}",
          flush=True)  # fmt: skip


def decisions(known: int, words: int = 400, timed: int = 2000) -> None:
    """Time reading a prompt and choosing, among so many known ones; each is then known too."""
    memory, draw, times = Memory(known), random.Random(0), []
    templates = [_template(draw, words) for _ in range(known // 100)]
    fresh = [_template(draw, words) for _ in range(timed // 100)]
    start = time.perf_counter()
    for i in range(known + timed):
        text = _filled(draw.choice(templates if i < known else fresh), draw)
        begun = time.perf_counter()
        prompt = prompt_of({"messages": [{"role": "user", "content": text}]}, "")
        assert prompt is not None
        if i >= known:
            shares = memory.shares(prompt, range(_REPLICAS))
            choose(len(prompt.words), [Standing(r, s) for r, s in shares.items()], draw)
            times.append(time.perf_counter() - begun)
        memory.add(prompt, draw.randrange(_REPLICAS))
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1e3
    print(f"{len(memory)} known after {time.perf_counter() - start:.0f} s,"
          f" {memory.num_bytes / len(memory):.0f} bytes each; decision p50 {p50:.2f} ms,"
          f" p99 {p99:.2f} ms, longest {max(times) * 1e3:.2f} ms", flush=True)  # fmt: skip


def main() -> None:
    if _KNOWN:
        decisions(_KNOWN)
    folder = Path(tempfile.mkdtemp(prefix="kvshare-measured-"))
    with routed(folder, [_SERVE] * _REPLICAS) as (replicas, router):
        urls = [each.url for each in replicas]
        streams(urls, router.url)
        exactly(urls, router.url)
        killed(replicas, router)


def streams(urls: Sequence[str], router: str) -> None:
    """One process, a router and a plain balancer, each with the same requests."""
    texts = families(12, _EACH, 80)
    for at_a_time in (1, 8):
        one = stream("one process", texts, lambda _: urls[0], at_a_time)
        through = stream("router", texts, lambda _: router, at_a_time)
        stream("round robin", texts, lambda i: urls[i % len(urls)], at_a_time)
        pairs = list(zip(one, through, strict=True))
        alike = [a.text == b.text for a, b in pairs if plan(a) == plan(b)]
        print(f"  {sum(a.text == b.text for a, b in pairs)} of {len(pairs)} answers are equal;"
              f" {sum(alike)} of {len(alike)} with equal plans", flush=True)  # fmt: skip


def exactly(urls: Sequence[str], router: str) -> None:
    """A router whose requests reuse exactly, and one process without reuse."""
    texts = families(12, 2, 80, seed=2) * 2
    off = stream("one process, reuse off", texts, lambda _: urls[0], 4, reuse="off")
    exact = stream("router, exact reuse", texts, lambda _: router, 4, reuse="exact")
    print(f"  {sum(a.text == b.text for a, b in zip(off, exact, strict=True))} of {len(off)}"
          " answers are those without reuse")  # fmt: skip
    _print_metrics(router, "kvshare_router_requests_total")


def stream(
    name: str, texts: Sequence[str], url_of: Callable[[int], str], at_a_time: int, **ours: object
) -> list[Sample]:
    """Answers to short requests; prints what they reused."""
    asked = bodies(texts, f"{name} {at_a_time}", 4, **ours)
    samples = sent(asked, url_of, at_a_time, ask_whole)
    told(f"{name}, {at_a_time} at a time", samples)
    return samples


def killed(replicas: Sequence[Command], router: Command) -> None:
    """Kill a replica while sixteen clients stream, and start it again; the next time another."""
    texts = families(12, _EACH, 80, seed=3)
    right = sent(bodies(texts, "right", 24, reuse="off", store=False), lambda _: router.url, 4)
    for number in range(_KILLS):
        victim = replicas[-1 - number % len(replicas)]
        timer = threading.Timer(8, victim.kill)
        timer.start()
        asked = bodies(texts, f"killed {number}", 24, reuse="exact")
        samples = sent(asked, lambda _: router.url, 16)
        timer.join()
        failed = [s for s in samples if s.error]
        wrong = [a for a, b in zip(samples, right, strict=True) if not a.error and a.text != b.text]
        print(f"kill -9: {len(samples)} requests, {len(failed)} failed,"
              f" {sum(s.ttft is None for s in failed)} of them before their first text;"
              f" {len(wrong)} wrong")  # fmt: skip
        victim.start()
    _print_metrics(router.url, "kvshare_router_lost_total", "kvshare_router_up")


def _print_metrics(router: str, *names: str) -> None:
    lines = httpx2.get(f"{router}/metrics").text.splitlines()
    print([line for line in lines if line.startswith(names)], flush=True)


if __name__ == "__main__":
    main()
