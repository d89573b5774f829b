"""`kvshare bench memory`: what the DELTA tree saves, and whether budgets hold."""

from __future__ import annotations

import random
import resource
from typing import Any

import psutil
from rich.progress import track

from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.stories import lab_report, random_values


def run(rig: Rig, *, num_requests: int = 100) -> dict[str, Any]:
    """Serve lab reports with other numbers each, storing all, and look at the bytes.

    Returns:
        Bytes held, bytes if each request were stored whole, and the process's memory: before,
        at its peak, and what the budgets allow.
    """
    rng = random.Random(0)
    ns = rig.namespace("memory")
    before = psutil.Process().memory_info().rss
    slots, host_bytes = rig.runner.max_bytes, rig.config.host_budget()
    for i in track(range(num_requests), "Serving lab reports", transient=True):
        text = lab_report(random_values(rng), str(10_000 + i), "Question: What is the urea value?")
        stream = encode(rig, text)
        rig.save(stream, ns, rig.serve(stream, ns, METHODS["kvshare"]))
    shape, dtype = rig.loaded.kv_shape, rig.loaded.dtype
    per_token, packed = (
        (shape.bytes_per_token(dtype, in_eight_bits) if shape else 0)
        for in_eight_bits in (False, True)
    )
    saved = rig.donors.tree.num_tokens_owned * per_token
    whole = rig.donors.tree.num_tokens_whole * per_token
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "kind": "memory",
        "model": rig.loaded.name,
        "requests": num_requests,
        "donors": len(rig.donors.tree),
        "bytes_held": rig.donors.store.bytes_by_tier(),
        "bytes_owned": saved,
        "bytes_packed": rig.donors.tree.num_tokens_owned * packed,
        "bytes_whole": whole,
        "times_less": whole / saved,
        "rss_before_bytes": before,
        "rss_peak_bytes": peak,
        "budget_bytes": {"host": host_bytes, "slots": slots},
        "within_budget": peak - before <= host_bytes + slots,
    }
