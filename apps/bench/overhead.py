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
    and save cost depends on their number and size, not on the values.

    Returns:
        Medians in seconds of a full prefill without reuse, of lookup and planning, of saving
        the request, and of the whole first-token time with reuse; and the shares.
    """
    ns = rig.namespace("overhead")
    k, v = rig.runner.slot_kv(0)
    with torch.inference_mode():
        k[:, :, :num_tokens].normal_()
        v[:, :, :num_tokens].normal_()
    tokenizer = rig.loaded.tokenizer
    stored = 0
    for text in track(prompts, "Storing donors", transient=True):
        ids = np.array(tokenizer(text)["input_ids"][:_DONOR_TOKENS], dtype=np.uint64)
        if len(ids) and rig.donors.save(ids, ns, ReusePlan(len(ids)), k, v, ""):
            stored += 1
        if stored >= num_donors:
            break
    rng = np.random.default_rng(0)
    full, shared, lookup, save = [], [], [], []
    for _ in track(range(repeats), "Measuring misses", transient=True):
        stream = text_stream(rng.integers(3, len(tokenizer), num_tokens))
        full.append(rig.serve(stream, ns, METHODS["full"]).ttft)
        miss = rig.serve(stream, ns, METHODS["kvshare"])
        shared.append(miss.ttft)
        lookup.append(miss.result.lookup + miss.result.planning)
        start = time.perf_counter()
        saved = rig.save(stream, ns, miss)
        save.append(time.perf_counter() - start)
        if saved:
            rig.donors.delete(saved)
    medians = {
        "full_prefill_s": statistics.median(full),
        "shared_prefill_s": statistics.median(shared),
        "lookup_and_plan_s": statistics.median(lookup),
        "save_s": statistics.median(save),
    }
    cost = medians["lookup_and_plan_s"] + medians["save_s"]
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
