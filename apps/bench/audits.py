"""`kvshare bench audits`: what audits cost those who are waiting for a first token.

The same stream of requests, with a pause behind each, is served by engines that differ in the share
of requests that they audit. They take turns, a few requests each, so that all meet the same
machine; while one is asked, the others have nothing left to audit. An audit begins in a pause, and
whoever comes then interrupts it. What audits teach changes how much is computed, which takes its
own time: so those requests are told apart that computed as much with audits as without.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from rich.progress import track

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.shifts import Asked
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.sampling import SamplingParams

# Requests of one engine before it is the next one's turn.
_TURN = 6
_MAX_TOKENS = 4


def run(
    model: str,
    stream: Sequence[Asked],
    shares: Sequence[float],
    *,
    pause_s: float,
    **options: Any,
) -> dict[str, Any]:
    """Serve `stream` with every share of audits; 0 is served too.

    Args:
        pause_s: behind each request, seconds.
        options: of every engine.

    Returns:
        The report as JSON-ready data: by share, the seconds until the first token of all requests,
        the share of their tokens that was computed, how many were audited in the end, how many
        audits were interrupted, and what the ``alike`` waited, see `_alike`.
    """
    params = SamplingParams(max_tokens=_MAX_TOKENS)
    served: dict[float, list[RequestOutput]] = {share: [] for share in (0.0, *shares)}
    with ExitStack() as opened:
        engines = {
            share: opened.enter_context(KVShare(model, embedder=None, audit_share=share, **options))
            for share in served
        }
        turns = [stream[at : at + _TURN] for at in range(0, len(stream), _TURN)]
        for number, turn in enumerate(track(turns, "Turns", transient=True)):
            order = list(engines)
            order = order[number % len(order) :] + order[: number % len(order)]
            for share in order:
                for asked in turn:
                    served[share].append(_answer(engines[share], asked, params))
                    time.sleep(pause_s)
                engines[share].flush()
                engines[share].wait_audited()
        audits = {s: engine.stats().get("audits", {}) for s, engine in engines.items()}
    return {
        "kind": "audits",
        "model": model,
        "requests": len(stream),
        "pause_s": pause_s,
        "shares": {
            f"{share:g}": {
                "ttft_s": spread([output.metrics.ttft for output in found], 50, 90, 99),
                "computed_share": _computed_share(found),
                "audits": _over(audits[share].get("results", {})),
                "interrupted": audits[share].get("results", {}).get("yielded", 0),
                "alike": _alike(found, served[0.0]),
            }
            for share, found in served.items()
        },
    }


def _alike(audited: Sequence[RequestOutput], plain: Sequence[RequestOutput]) -> dict[str, Any]:
    """The requests that computed as many tokens with audits as without: how many they are, and the
    first token's time with audits over that without: ``p50`` of the requests' own ratios, ``p99``
    the ratio of the slowest hundredth's."""
    pairs = [
        (a.metrics.ttft, p.metrics.ttft)
        for a, p in zip(audited, plain, strict=True)
        if a.provenance.recomputed == p.provenance.recomputed
    ]
    if not pairs:
        return {"requests": 0, "p50": None, "p99": None}
    with_audits, without = np.array(pairs).T
    return {
        "requests": len(pairs),
        "p50": float(np.median(with_audits / without)),
        "p99": float(np.percentile(with_audits, 99) / np.percentile(without, 99)),
    }


def _over(results: dict[str, int]) -> int:
    return sum(results.get(name, 0) for name in ("kept", "missed", "fact"))


def _computed_share(outputs: Sequence[RequestOutput]) -> float:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return sum(output.provenance.recomputed for output in outputs) / tokens


def _answer(llm: KVShare, asked: Asked, params: SamplingParams) -> RequestOutput:
    prompt = asked.prompt
    if isinstance(prompt, str) and not asked.chat:
        return llm.generate(prompt, params)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return llm.chat(messages, params)
