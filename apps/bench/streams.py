"""`kvshare bench streams`: running answers while a long prompt comes, and a short one behind it.

The same work with chunks of several sizes and with the whole prompt at once: what a chunk's size
gives the running answers, and what it takes from the prompt and from throughput.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.progress import track

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.config import RequestOptions
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput

# Tokens of the streams' prompts and of the short one.
_PROMPT = 48
# Tokens of each stream before the long prompt comes: what a token usually takes.
_USUAL = 16
_OPTIONS = RequestOptions(reuse="off", store=False)
WHOLE = "the whole prompt"


@dataclass(frozen=True, slots=True)
class _Answer:
    """One request's answer.

    Attributes:
        submitted: `time.perf_counter`, about.
    """

    submitted: float
    output: RequestOutput

    @property
    def first(self) -> float:
        """`time.perf_counter` of its first token."""
        return self.submitted + self.output.metrics.ttft

    @property
    def times(self) -> list[tuple[float, float]]:
        """When each token behind the first came, and the seconds since the one before it."""
        each = self.output.metrics.token_times
        return list(zip(itertools.accumulate(each, initial=self.first), each, strict=False))


def run(
    model: str, *, streams: int, tokens: int, answer: int, chunks: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Serve the same requests with each size of chunk, in turns; a report of kind "streams".

    Args:
        streams: answers that run.
        tokens: of the long prompt.
        answer: tokens of each stream.
        chunks: sizes of the long prompt's chunks beside them.
        repeats: times that each is measured.
    """
    longest = max(tokens, _PROMPT + answer) + 16
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for size in track([None, *chunks], "Serving streams", transient=True):
            with KVShare(
                model,
                embedder=None,
                drafts=False,  # they would hide how long a step takes
                max_num_seqs=streams + 2,
                max_model_len=longest,
                prefill_beside=size or longest,
                prefill_chunk=longest if size is None else None,
            ) as llm:
                served = asyncio.run(_serve(llm, streams, tokens, answer))
            found.setdefault(str(size or WHOLE), []).append(served)
    ways = {name: _joined(each) for name, each in found.items()}
    for way in ways.values():
        way["throughput_of_whole"] = way["tokens_s"] / ways[WHOLE]["tokens_s"]
    return {
        "kind": "streams",
        "model": model,
        "streams": streams,
        "tokens": tokens,
        "answer": answer,
        "repeats": repeats,
        "chunks": ways,
    }


async def _serve(llm: KVShare, streams: int, tokens: int, answer: int) -> dict[str, Any]:
    """Streams, then a long prompt, then a short one."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, len(llm.tokenizer), _PROMPT).tolist() for _ in range(streams + 1)]
    long = rng.integers(0, len(llm.tokenizer), tokens).tolist()
    await _ask(llm, prompts[-1], 4)  # the first forwards of a process are slow
    begun = time.perf_counter()
    run_in = [asyncio.Event() for _ in range(streams)]
    running = [
        asyncio.create_task(_ask(llm, prompt, answer, event))
        for prompt, event in zip(prompts, run_in, strict=False)
    ]
    for event in run_in:
        await event.wait()
    beside = asyncio.create_task(_ask(llm, long, 1))
    await asyncio.sleep(0)  # it is submitted
    short = await _ask(llm, prompts[-1], 1)
    late = await beside
    answers = [await task for task in running]
    took = max(a.submitted + a.output.metrics.total for a in (*answers, late, short)) - begun
    times = [each for one in answers for each in one.times]
    made = sum(len(a.output.token_ids) for a in (*answers, late, short))
    return {
        "usual": [took for at, took in times if at + took <= late.submitted],
        "beside": [took for at, took in times if at + took > late.submitted and at < late.first],
        "short": short.output.metrics.ttft,
        "long": late.output.metrics.ttft,
        "tokens_s": (made + tokens + _PROMPT * (streams + 1)) / took,
    }


async def _ask(
    llm: KVShare, prompt: list[int], max_tokens: int, running: asyncio.Event | None = None
) -> _Answer:
    """One request; `running` is set when `_USUAL` of its tokens are out, or all."""
    spec = llm.read(prompt, options=_OPTIONS, max_tokens=max_tokens, ignore_eos=True)
    start, output, said = time.perf_counter(), None, 0
    async for chunk in llm.astream(spec):
        output, said = chunk.output, said + len(chunk.token_ids)
        if running is not None and (said > _USUAL or output is not None):
            running.set()
    assert output is not None
    return _Answer(start, output)


def _joined(served: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All measurements of one size of chunk."""
    usual, beside = (
        spread([s for one in served for s in one[which]], 50, 99) for which in ("usual", "beside")
    )
    medians = {
        name: statistics.median(one[name] for one in served)
        for name in ("short", "long", "tokens_s")
    }
    p50, p99 = usual["p50"], beside["p99"]
    return {
        "usual_s": usual,
        "beside_s": beside,
        "times_usual": p99 / p50 if p50 and p99 else None,
        "short_ttft_s": medians["short"],
        "long_ttft_s": medians["long"],
        "tokens_s": medians["tokens_s"],
    }
