"""Many clients at once on a running server: ``python soak.py URL --clients 64 --seconds 120``.

Every letter carries a number that its answer must repeat. Each fourth client goes away in the
middle of its answer, again and again. In the end no answer may hold another letter's number, and
all slots must be free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx2
import psutil

from kvshare_mm.apps.desk.shop import Letter

_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
_KILLED = 4


@dataclass(slots=True)
class Tally:
    """What happened.

    Attributes:
        answered: complete answers with their own number.
        silent: complete answers without their number, that the model gives alone as well: (reuse,
            number, answer).
        changed: the same, where alone the model does repeat the number. With "similar", reuse is
            approximate and a small model may drop a digit; with "exact" there must be none.
        mixed: answers that hold another letter's number: (number, answer).
        killed: answers that their client left.
        failed: anything else, in words.
        memory_mib: of the server's process, at each tenth of the time.
    """

    answered: int = 0
    silent: list[tuple[str, str, str]] = field(default_factory=list)
    changed: list[tuple[str, str, str]] = field(default_factory=list)
    mixed: list[tuple[str, str]] = field(default_factory=list)
    killed: int = 0
    failed: list[str] = field(default_factory=list)
    memory_mib: list[int] = field(default_factory=list)


async def soak(
    url: str, clients: int, seconds: float, pid: int | None = None, seed: int = 0
) -> Tally:
    """Run `clients` clients for `seconds` seconds; those of an odd number share exactly only."""
    tally, sent = Tally(), set[str]()
    unsaid: list[tuple[str, Letter, str]] = []
    end = time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client(number: int) -> None:
            draw = random.Random(f"{seed} {number}")
            while time.monotonic() < end:
                order = str(draw.randrange(1_000, 10_000))
                sent.add(order)
                letter = Letter(draw.choice(_NAMES), order, "What is my order number?")
                stop_after = draw.randrange(1, 6) if number % _KILLED == 0 else None
                reuse = "exact" if number % 2 else "similar"
                try:
                    text = await _answer(http, letter, reuse, stop_after)
                except Exception as error:
                    tally.failed.append(f"{type(error).__name__}: {error}")
                    continue
                if text is None:
                    tally.killed += 1
                    continue
                numbers = set(re.findall(r"\d{4,}", text))
                if numbers & (sent - {order}):
                    tally.mixed.append((order, text))
                elif order in numbers:
                    tally.answered += 1
                else:
                    unsaid.append((reuse, letter, text))

        async def watch() -> None:
            process = psutil.Process(pid)
            for _ in range(10):
                await asyncio.sleep(seconds / 10)
                tally.memory_mib.append(process.memory_info().rss >> 20)

        await asyncio.gather(*(client(i) for i in range(clients)), *([watch()] if pid else []))
        # A small model miscopies digits now and then: what does it say to the same letter alone?
        for reuse, letter, text in unsaid:
            alone = await _answer(http, letter, "off", None)
            told = tally.changed if letter.order in str(alone) else tally.silent
            told.append((reuse, letter.order, text))
    return tally


async def _answer(
    http: httpx2.AsyncClient, letter: Letter, reuse: str, stop_after: int | None
) -> str | None:
    body: dict[str, Any] = {
        "messages": letter.messages(),
        "stream": True,
        "max_tokens": 16,
        "temperature": 0,
        "kvshare": {"reuse": reuse},
    }
    text, pieces, finished = "", 0, False
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"status {reply.status_code}")
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                pieces += 1
                if stop_after is not None and pieces > stop_after:
                    return None
    if not finished:
        raise RuntimeError("the stream was cut off")
    return text


async def settled(url: str, seconds: float = 60) -> bool:
    """Whether all slots are free, some time after the last client went."""
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    end = time.monotonic() + seconds
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < end:
            lines = (await http.get("/metrics")).text.splitlines()
            if all(line.endswith(" 0.0") for line in lines if line.startswith(names)):
                return True
            await asyncio.sleep(0.1)
    return False


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    given = parser.parse_args()
    tally = await soak(given.url, given.clients, given.seconds, given.pid)
    told = asdict(tally) | {"slots_free": await settled(given.url)}
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    asyncio.run(_main())
