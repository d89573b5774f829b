"""What a tenant learns of another with a stop-watch: ``python stopwatch.py URL --keys A B``.

In each round tenant A asks something. Then tenant B asks the same, and something that nobody has
asked, in either order; and A asks its own once more. A watch that tells nothing is right in half
of the guesses which of two answers was the slower one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import httpx2

_WORDS = ["lamp", "kettle", "radio", "chair", "clock", "phone", "camera", "order", "return",
          "money", "card", "delivery", "warranty", "repair", "shop", "service", "desk", "letter",
          "number", "report", "value", "patient", "glass", "parcel", "street", "house", "invoice",
          "day"]  # fmt: skip


def first_token_s(http: httpx2.Client, key: str, prompt: str) -> float:
    """Seconds to an answer of one token."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    started = time.perf_counter()
    reply = http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    reply.raise_for_status()
    return time.perf_counter() - started


def guessed(slower: list[float], faster: list[float]) -> float:
    """How often, of a pair drawn from both, the first is the slower one."""
    pairs = [(a, b) for a in slower for b in faster]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def measure(url: str, key_a: str, key_b: str, rounds: int, words: int) -> dict[str, list[float]]:
    """Seconds by who asked what."""
    draw = random.Random(0)
    times: dict[str, list[float]] = {"B, asked by A": [], "B, asked by nobody": [], "A again": []}

    def prompt() -> str:
        return " ".join(draw.choices(_WORDS, k=words))

    with httpx2.Client(base_url=url, timeout=600) as http:
        for key in (key_a, key_b):
            first_token_s(http, key, prompt())
        for _ in range(rounds):
            asked = prompt()
            first_token_s(http, key_a, asked)
            of_b = [("B, asked by A", asked), ("B, asked by nobody", prompt())]
            draw.shuffle(of_b)
            for name, text in of_b:
                times[name].append(first_token_s(http, key_b, text))
            times["A again"].append(first_token_s(http, key_a, asked))
    return times


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--keys", nargs=2, required=True, metavar=("A", "B"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--words", type=int, default=250)
    given = parser.parse_args()
    times = measure(given.url, *given.keys, given.rounds, given.words)
    for name, seconds in times.items():
        print(f"{name:20} median {1000 * statistics.median(seconds):6.0f} ms of {len(seconds)}")
    unknown = times["B, asked by nobody"]
    for name in ("B, asked by A", "A again"):
        print(f"{name:20} told from what nobody asked: {guessed(unknown, times[name]):.0%}")


if __name__ == "__main__":
    _main()
