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
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.stories import lab_report, random_values


def run(rig: Rig, *, reports: int, values: int, repeats: int) -> dict[str, Any]:
    """Measure a prompt of lab reports of which `values` numbers differ from a stored one's.

    Returns:
        Medians in seconds by way of serving, tokens computed, and what KVShare is of the ideal.
    """
    donor, target = (encode(rig, text) for text in prompts(reports, values, random.Random(0)))
    ns = rig.namespace("template")
    kvshare = METHODS["kvshare"]
    first = rig.serve(donor, ns, METHODS["full"])
    rig.save(donor, ns, first)
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
        "kind": "template",
        "model": rig.loaded.name,
        "tokens": len(target),
        "values": values,
        "kept_share": 1 - len(plan.placeholders) / len(target),
        "placeholders": len(plan.placeholders),
        "computed": plan.num_computed,
        "ttft_s": medians,
        "kvshare_times_sooner": medians["full"] / medians["kvshare"],
        "kvshare_of_ideal": medians["kvshare"] / medians["ideal"],
        "repeat_times_sooner": medians["full"] / medians["repeat"],
    }


def pair(*, reports: int, values: int) -> dict[str, str]:
    """The two prompts as a pair of `kvshare bench reuse`."""
    donor, target = prompts(reports, values, random.Random(0))
    name = f"{reports} reports, {values} numbers differ"
    return {"id": name, "donor": donor, "target": target}


def prompts(reports: int, values: int, rng: random.Random) -> tuple[str, str]:
    """Lab reports with a question behind them; again with `values` other numbers, evenly spread."""
    first, second = variants(reports, values, 2, rng)
    return first, second


def variants(reports: int, values: int, number: int, rng: random.Random) -> list[str]:
    """Lab reports with a question behind them, and so many prompts in all that differ from the
    first in the patients and in `values` numbers, the same ones, evenly spread."""
    before = [random_values(rng) for _ in range(reports)]
    per_report = len(before[0])
    places = np.linspace(0, reports * per_report - 1, values).astype(int)
    question = "Question: What is the urea value of the first report?"
    texts = [_text(before, 48210, question)]
    for other in range(1, number):
        after = [list(row) for row in before]
        for at in places:
            row, column = divmod(int(at), per_report)
            after[row][column] = random_values(rng)[column]
        texts.append(_text(after, 48210 + 29135 * other, question))
    return texts


def _text(rows: list[list[str]], patient: int, question: str) -> str:
    *first, last = rows
    parts = [lab_report(row, str(patient + i), "") for i, row in enumerate(first)]
    return "".join([*parts, lab_report(last, str(patient + len(first)), question)])
