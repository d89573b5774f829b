"""`kvshare bench overhead`: what a miss costs while many donors are stored."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track

from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import text_stream

_DONOR_TOKENS = 32


def run(
    rig: Rig,
    prompts: Sequence[str],
    *,
    num_donors: int = 5000,
    num_tokens: int = 400,
    repeats: int = 15,
) -> dict[str, Any]:
    """Fill the pool, then serve prompts that share nothing with it, with and without reuse.

    Donors are the first 32 tokens of prompts, with made-up KV of the model's shape: what lookup
    and capture cost depends on their number and size, not on the values.

    Returns:
        Medians in seconds of a full prefill without reuse, of lookup and planning, of capturing
        the request, and of the whole first-token time with reuse; and the shares.
    """
    ns = rig.namespace("overhead")
    keys, values = rig.runner.slot_kv(0)
    with torch.inference_mode():
        keys[:, :, :num_tokens].normal_()
        values[:, :, :num_tokens].normal_()
    tokenizer = rig.loaded.tokenizer
    stored = 0
    for text in track(prompts, "Storing donors", transient=True):
        ids = np.array(tokenizer(text)["input_ids"][:_DONOR_TOKENS], dtype=np.uint64)
        if len(ids) and rig.donors.capture(ids, ns, ReusePlan(len(ids)), keys, values, ""):
            stored += 1
        if stored >= num_donors:
            break
    rng = np.random.default_rng(0)
    full, shared, lookup, capture = [], [], [], []
    for _ in track(range(repeats), "Measuring misses", transient=True):
        stream = text_stream(rng.integers(3, len(tokenizer), num_tokens))
        full.append(rig.serve(stream, ns, METHODS["full"]).ttft)
        miss = rig.serve(stream, ns, METHODS["kvshare"])
        shared.append(miss.ttft)
        lookup.append(miss.result.lookup + miss.result.planning)
        start = time.perf_counter()
        captured = rig.capture(stream, ns, miss)
        capture.append(time.perf_counter() - start)
        if captured:
            rig.donors.delete(captured)
    medians = {
        "full_prefill_s": statistics.median(full),
        "shared_prefill_s": statistics.median(shared),
        "lookup_and_plan_s": statistics.median(lookup),
        "capture_s": statistics.median(capture),
    }
    cost = medians["lookup_and_plan_s"] + medians["capture_s"]
    return {
        "kind": "overhead",
        "model": rig.loaded.name,
        "donors": stored,
        "tokens": num_tokens,
        "repeats": repeats,
        **medians,
        "miss_cost_s": cost,
        "miss_cost_share": cost / medians["full_prefill_s"],
    }
