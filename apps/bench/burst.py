"""`kvshare bench burst`: similar requests that come at once, to an engine that knows nothing yet.

With reuse of similar requests beside none at all: how much of the prompts is computed, and when the
first tokens come.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.template import variants
from kvshare_mm.config import Reuse
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput

WAYS: dict[str, Reuse] = {"each computes its own": "off", "similar": "similar"}


def run(
    model: str,
    *,
    requests: int,
    reports: int,
    values: int,
    answer: int,
    engine: Literal["native", "vllm"] = "native",
) -> dict[str, Any]:
    """Ask a burst of an engine with reuse and of one without; a report of kind "burst".

    Args:
        requests: of the burst.
        reports: lab reports in each prompt.
        values: numbers in which each differs from the others.
        answer: tokens of each.
    """
    prompts = variants(reports, values, requests, random.Random(0))
    ways: dict[str, Any] = {}
    for name, reuse in WAYS.items():
        with KVShare(model, engine=engine, embedder=None, reuse=reuse, audit_share=0) as llm:
            llm.generate("warm", max_tokens=2, reuse="off", store=False)
            outputs = llm.generate(prompts, max_tokens=answer, ignore_eos=True)
        ways[name] = _summed(outputs)
    off, similar = ways.values()
    return {
        "kind": "burst",
        "model": model,
        "engine": engine,
        "requests": requests,
        "tokens": max(len(o.prompt_token_ids) for o in outputs),
        "values": values,
        "answer": answer,
        "ways": ways,
        "computed_share": similar["computed"] / off["computed"],
        "times_sooner": off["ttft_s"]["p50"] / similar["ttft_s"]["p50"],
    }


def _summed(outputs: list[RequestOutput]) -> dict[str, Any]:
    return {
        "computed": sum(o.provenance.recomputed for o in outputs),
        "declined": sum(o.provenance.declined is not None for o in outputs),
        "ttft_s": spread([o.metrics.ttft for o in outputs], 50, 90),
        "total_s": max(o.metrics.total for o in outputs),
    }
