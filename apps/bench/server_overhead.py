"""`kvshare bench server-overhead`: what the server adds to the first token over the Python API."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.progress import track

from kvshare_mm.apps.bench.serve import ask, client_of, first_model
from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import ConfigError
from kvshare_mm.llm import KVShare
from kvshare_mm.sampling import SamplingParams

_WORDS = (
    "apple bread chair cloud door fish glass green house lamp milk paper river stone table wind"
)
_MAX_TOKENS = 4
_WARM_UP = 2
_SETTLE_S = 0.1  # what a request leaves to be tidied up must not run into the next one
_START_S = 600.0  # the first run on a machine converts the model


@dataclass(frozen=True, slots=True)
class Turn:
    """One request on one side; seconds.

    Attributes:
        ttft: until the caller had the first text.
        engine: of it, from the engine's queue to its first token.
        text: the answer.
    """

    ttft: float
    engine: float
    text: str


def prompts(count: int, words: int, length: Callable[[str], int]) -> list[str]:
    """Different prompts of random words that are all as long.

    Args:
        count: how many.
        words: in each.
        length: a prompt's, in tokens.
    """
    draw = random.Random(0)
    by_length: dict[int, list[str]] = defaultdict(list)
    while True:  # lengths are few: one of them fills up
        text = " ".join(draw.choices(_WORDS.split(), k=words))
        alike = by_length[length(text)]
        if text not in alike:
            alike.append(text)
        if len(alike) == count:
            return alike


@contextmanager
def started(model: str, dtype: str) -> Iterator[str]:
    """The URL of a server in a process of its own, ready, and ended in the end.

    Raises:
        ConfigError: it ended by itself, or did not get ready.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvshare_mm.apps.cli", "serve", model, "--port", "0",
                 "--embedder", "none", "--dtype", dtype],
                stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
        try:
            yield _ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run(
    llm: KVShare, url: str, *, key: str | None = None, repeats: int = 15, words: int = 16
) -> dict[str, Any]:
    """Ask both, in turns, for the same prompts, without reuse.

    Args:
        llm: the Python API.
        url: of a server of the same model.
        key: API key of the server.
        repeats: prompts measured.
        words: in each.

    Returns:
        Medians in seconds, and the paired differences.

    Raises:
        ConfigError: the server does not answer, or serves another model.
    """
    texts = prompts(repeats + _WARM_UP, words, lambda text: len(llm.tokenize(_messages(text))))
    pairs = asyncio.run(_pairs(llm, url, texts, key))[_WARM_UP:]
    differences = [server.ttft - api.ttft for server, api in pairs]
    sides = {"server": [s for s, _ in pairs], "api": [a for _, a in pairs]}
    return {
        "kind": "server-overhead",
        "model": llm.config.model,
        "tokens": len(llm.tokenize(_messages(texts[0]))),
        "repeats": repeats,
        "ttft_s": {name: statistics.median(t.ttft for t in those) for name, those in sides.items()},
        "outside_engine_s": {
            name: statistics.median(t.ttft - t.engine for t in those)
            for name, those in sides.items()
        },
        "difference_s": {
            "median": statistics.median(differences),
            "p90": float(np.quantile(differences, 0.9)),
            "all": differences,
        },
        "same_answers": sum(server.text == api.text for server, api in pairs),
    }


async def _pairs(
    llm: KVShare, url: str, texts: list[str], key: str | None
) -> list[tuple[Turn, Turn]]:
    async with client_of(url, key) as client:
        model = await first_model(client)
        pairs = []
        for i, text in enumerate(track(texts, "Asking both", transient=True)):
            turns: dict[str, Turn] = {}
            for side in ("server", "api") if i % 2 else ("api", "server"):
                await asyncio.sleep(_SETTLE_S)
                turns[side] = (
                    await _of_server(client, model, text)
                    if side == "server"
                    else _of_api(llm, text)
                )
            pairs.append((turns["server"], turns["api"]))
        return pairs


async def _of_server(client: httpx2.AsyncClient, model: str, text: str) -> Turn:
    body = {
        "model": model,
        "messages": _messages(text),
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "kvshare": {"reuse": "off", "store": False},
    }
    sample = await ask(client, body)
    if sample.error or sample.ttft is None:
        raise ConfigError(f"the server gave no answer: {sample.error or 'it has no text'}")
    if not sample.reuse:
        raise ConfigError("the server is not this project's")
    return Turn(sample.ttft, sample.reuse["seconds"]["ttft"], sample.text)


def _of_api(llm: KVShare, text: str) -> Turn:
    params = SamplingParams(max_tokens=_MAX_TOKENS, ignore_eos=True)
    options = RequestOptions(reuse="off", store=False)
    start = time.perf_counter()
    ttft, said, output = None, "", None
    for chunk in llm.stream(_messages(text), params, options):
        if chunk.text and ttft is None:
            ttft = time.perf_counter() - start
        said += chunk.text
        output = chunk.output
    if ttft is None or output is None:
        raise ConfigError("the model gave no answer: it has no text")
    return Turn(ttft, output.metrics.ttft, said)


def _messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        said = log.read_text(encoding="utf-8", errors="replace")
        if process.poll() is not None:
            last = said.strip().rpartition("\n")[2]
            raise ConfigError(f"the server ended with {process.returncode}: {last}")
        found = re.search(r"listening on (http://\S+)", said)
        if found:
            try:
                if httpx2.get(f"{found[1]}/health").status_code == httpx2.codes.OK:
                    return found[1]
            except httpx2.HTTPError:
                pass  # it has an address, and does not listen yet
        time.sleep(0.2)
    raise ConfigError("the server did not get ready")
