"""`kvshare bench template`: a report with other numbers against the ideal.

The ideal is the forward over the very positions that KVShare computes, with all other KV in place
already: no lookup, no plan, no edit.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import numpy as np

from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig, machine
from kvshare_mm.apps.stories import lab_report, random_values
from kvshare_mm.stream import SegmentStream, text_stream


def run(rig: Rig, *, num_tokens: int, num_changed: int, repeats: int) -> dict[str, Any]:
    """Measure a prompt of `num_tokens` of which `num_changed` differ from a stored one.

    Returns:
        Medians in seconds by way of serving, tokens computed, and what KVShare is of the ideal.
    """
    rng = random.Random(0)
    texts = [
        lab_report(random_values(rng), str(i), "Question: What is the urea value?")
        for i in range(10_000, 10_000 + num_tokens // 300 + 1)
    ]
    donor = text_stream(encode(rig, "\n".join(texts)).token_ids[:num_tokens])
    target = _changed(donor, num_changed, rng)
    ns = rig.namespace("template")
    kvshare = METHODS["kvshare"]
    first = rig.serve(donor, ns, METHODS["full"])
    rig.capture(donor, ns, first)
    ways: dict[str, list[float]] = {w: [] for w in ("full", "kvshare", "ideal", "repeat")}
    for _ in range(repeats):
        ways["full"].append(rig.serve(target, ns, METHODS["full"]).ttft)
        shared = rig.serve(target, ns, kvshare)
        ways["kvshare"].append(shared.ttft)
        # The slot is full now: the ideal computes the same positions once more.
        start = time.perf_counter()
        int(rig.runner.prefill(0, target.token_ids, shared.result.plan.compute).argmax())
        ways["ideal"].append(time.perf_counter() - start)
        ways["repeat"].append(rig.serve(donor, ns, kvshare).ttft)
    plan = shared.result.plan
    medians = {way: statistics.median(times) for way, times in ways.items()}
    return {
        "machine": machine(),
        "model": rig.loaded.name,
        "tokens": len(target),
        "placeholders": len(plan.placeholders),
        "computed": plan.num_computed,
        "ttft_s": medians,
        "kvshare_times_sooner": medians["full"] / medians["kvshare"],
        "kvshare_of_ideal": medians["kvshare"] / medians["ideal"],
        "repeat_times_sooner": medians["full"] / medians["repeat"],
    }


def _changed(donor: SegmentStream, count: int, rng: random.Random) -> SegmentStream:
    """The donor with `count` tokens replaced, two at a time, spread over the prompt."""
    ids = donor.token_ids.copy()
    low, high = int(ids.min()), int(ids.max())
    for at in np.linspace(len(ids) // 10, len(ids) - 10, max(1, count // 2)).astype(int):
        for i in range(at, min(at + 2, len(ids))):
            ids[i] = rng.randint(low, high)
    return text_stream(ids)
