"""`kvshare bench quality`: are answers from reused KV as good as those of full recompute?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvshare_mm.apps.bench.bootstrap import difference, draws, interval
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import measured
from kvshare_mm.apps.bench.methods import METHODS, AnswerMethod, AnswerStore, AnyMethod, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig, Served, machine
from kvshare_mm.apps.bench.tasks import Item, Task
from kvshare_mm.apps.bench.tasks.facts import FactTask, leaks, states
from kvshare_mm.errors import InvalidRequestError

_FULL = METHODS["full"]
_DONOR_SLOT = 0


def slots_needed(methods: Sequence[AnyMethod]) -> int:
    """Slots that a rig needs: one for the donor, one for each method, one for full recompute."""
    return 2 + sum(isinstance(m, Method) and m is not _FULL for m in methods)


def run(
    rig: Rig,
    task: Task,
    items: Sequence[Item],
    methods: Sequence[AnyMethod],
    journal: Journal,
    *,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer every item by every method and score the answers.

    For each item the donor's request is prefilled and stored, and nothing else is: what a method
    makes of this donor is measured, not what a search finds. Then the target is prefilled by each
    method into a slot of its own, and all of them are decoded together.

    Args:
        rig: with `slots_needed` slots.
        methods: "full" is always measured; the others are compared with it.
        journal: results that are known already, and where new ones are kept.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The report as JSON-ready data: per method the score and its interval, the difference to full
        recompute and its interval (both 95%), tokens computed, and for tasks of facts the leaks.

    Raises:
        ConfigError: no item could be served.
    """
    if rig.num_slots < slots_needed(methods):
        raise ValueError(f"{slots_needed(methods)} slots are needed, the rig has {rig.num_slots}")
    methods = [_FULL, *(m for m in methods if m is not _FULL)]
    openers = {m.name: m.opener() for m in methods if isinstance(m, AnswerMethod)}
    rows, skipped = measured(
        items,
        lambda item: _measure(rig, task, item, methods, openers),
        keys=([item.id, item.donor, item.target, item.references] for item in items),
        names=(item.id for item in items),
        noun="item",
        title=f"Measuring {task.name}",
        journal=journal,
        progress=progress,
    )
    return {
        "kind": "quality",
        "machine": machine(),
        "model": rig.loaded.name,
        "task": task.name,
        "metric": task.metric,
        "items": len(rows),
        "skipped": skipped,
        "resamples": resamples,
        "methods": summarise(task, rows, [m.name for m in methods], resamples, seed),
        "per_item": [
            {"id": item.id, "references": item.references, "stale": item.stale, **row}
            for item, row in rows
        ],
    }


def summarise(
    task: Task,
    rows: Sequence[tuple[Item, dict[str, Any]]],
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Scores of all methods from their answers; the first name is full recompute."""
    times = draws(len(rows), resamples, seed)
    statistics = {
        name: np.array(
            [task.statistics(row["methods"][name]["answer"], item) for item, row in rows]
        )
        for name in names
    }
    tokens = sum(row["tokens"] for _, row in rows)
    summary = {}
    for name in names:
        parts = [row["methods"][name] for _, row in rows]
        answers = [part["answer"] for part in parts]
        change = difference(task.score, statistics[name], statistics[names[0]], times)
        summary[name] = {
            "score": interval(task.score, statistics[name], times).as_json(),
            "difference_to_full": change.as_json(),
            "significant": change.excludes_zero,
            "same_answer": sum(
                a == row["methods"][names[0]]["answer"]
                for a, (_, row) in zip(answers, rows, strict=True)
            )
            / len(rows),
            "computed_share": sum(part["computed_tokens"] for part in parts) / tokens,
            "work_share": sum(part["work_tokens"] for part in parts) / tokens,
            "declined": sum(part["declined"] is not None for part in parts),
        }
        if isinstance(task, FactTask):
            summary[name] |= _leak_test(rows, answers, names[0])
    return summary


def _leak_test(
    rows: Sequence[tuple[Item, dict[str, Any]]], answers: Sequence[str], full: str
) -> dict[str, Any]:
    right = leaked = stale = 0
    examples = []
    for (item, row), answer in zip(rows, answers, strict=True):
        by_full = row["methods"][full]["answer"]
        right += states(by_full, item.references[0])
        stale += item.stale is not None and states(answer, item.stale)
        if leaks(answer, by_full, item):
            leaked += 1
            examples.append(item.id)
    return {
        "changed_facts": sum(item.stale is not None for item, _ in rows),
        "full_states_new_fact": right,
        "leaks": leaked,
        "states_donor_fact": stale,
        "leaking_items": examples,
    }


def _measure(
    rig: Rig,
    task: Task,
    item: Item,
    methods: Sequence[AnyMethod],
    openers: dict[str, Callable[[], AnswerStore]],
) -> dict[str, Any]:
    donor, target = (encode(rig, text, task.chat) for text in (item.donor, item.target))
    longest = rig.max_len - task.max_new_tokens
    if max(len(donor), len(target)) > longest:
        raise InvalidRequestError(f"longer than {longest} tokens", "target")
    ns = rig.namespace(f"quality-{task.name}-{item.id}")
    first = rig.serve(donor, ns, _FULL, _DONOR_SLOT)
    stored = rig.capture(donor, ns, first)
    served: dict[str, Served] = {}
    try:
        for method in methods:
            if isinstance(method, Method):
                served[method.name] = rig.serve(target, ns, method, _DONOR_SLOT + 1 + len(served))
    finally:
        if stored:
            rig.donors.delete(stored)
    # The donor's own answer is only needed where answers are reused.
    batch = [*served.values(), *([first] if openers else [])]
    tokenizer = rig.loaded.tokenizer

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    answers = [
        task.clean(text(tokens))
        for tokens in rig.decode(batch, task.max_new_tokens, lambda tokens: task.ends(text(tokens)))
    ]
    results = {
        name: _result(answer, one.result.plan.num_computed, one.work, one.result.plan.declined)
        for (name, one), answer in zip(served.items(), answers, strict=False)
    }
    for name, open_store in openers.items():
        store = open_store()
        try:
            store.put(item.donor, answers[-1])
            found = store.get(item.target)
        finally:
            store.close()
        # A miss is asked of the model, which computes everything.
        results[name] = results[_FULL.name] if found is None else _result(found, 0, 0.0, None)
    return {"tokens": len(target), "methods": results}


def _result(answer: str, computed: int, work: float, declined: str | None) -> dict[str, Any]:
    return {
        "answer": answer,
        "computed_tokens": computed,
        "work_tokens": work,
        "declined": declined,
    }
