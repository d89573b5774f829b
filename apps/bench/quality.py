"""`kvshare bench quality`: are answers from reused KV as good as those of full recompute?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.measured import measured
from kvshare_mm.apps.bench.methods import FULL, AnswerMethod, AnswerStore, AnyMethod, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.tasks import Item, Task
from kvshare_mm.apps.bench.tasks.facts import FactTask, leaks, states

Row = dict[str, Any]


def slots_needed(methods: Sequence[AnyMethod]) -> int:
    """Slots that a rig needs: one for the donor, one for each method, one for full recompute."""
    return 2 + sum(isinstance(m, Method) and m is not FULL for m in methods)


def run(
    rig: Rig,
    task: Task,
    items: Sequence[Item],
    methods: Sequence[AnyMethod],
    journal: Journal | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
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
    methods = [FULL, *(m for m in methods if m is not FULL)]
    openers = {m.name: m.opener() for m in methods if isinstance(m, AnswerMethod)}
    rows, skipped = measured(
        items,
        lambda item: _measure(rig, task, item, methods, openers),
        journal,
        key=lambda item: [item.id, item.donor, item.target, item.references],
        name=lambda item: item.id,
        noun="item",
    )
    return {
        "kind": "quality",
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
    rows: Sequence[tuple[Item, Row]],
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Scores of all methods from their answers; the first name is full recompute."""
    tokens = sum(row["tokens"] for _, row in rows)
    by_full = [row["methods"][names[0]]["answer"] for _, row in rows]
    summary: dict[str, Any] = {}
    baseline: NDArray[np.float64] | None = None
    for name in names:
        parts = [row["methods"][name] for _, row in rows]
        answers = [part["answer"] for part in parts]
        statistics = np.array(
            [task.statistics(answer, item) for answer, (item, _) in zip(answers, rows, strict=True)]
        )
        baseline = statistics if baseline is None else baseline
        change = interval(task, statistics, baseline, resamples=resamples, seed=seed)
        summary[name] = {
            "score": interval(task, statistics, resamples=resamples, seed=seed),
            "difference_to_full": change,
            "significant": change["low"] > 0 or change["high"] < 0,
            "same_answer": sum(map(str.__eq__, answers, by_full)) / len(rows),
            "computed_share": sum(part["computed_tokens"] for part in parts) / tokens,
            "work_share": sum(part["work_tokens"] for part in parts) / tokens,
            "declined": sum(part["declined"] is not None for part in parts),
        }
        if isinstance(task, FactTask):
            summary[name] |= _leak_test([item for item, _ in rows], answers, by_full)
    return summary


def interval(
    task: Task,
    statistics: NDArray[np.float64],
    baseline: NDArray[np.float64] | None = None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """A score, or its difference to a baseline's, and the bounds of its 95% interval.

    The intervals are percentiles of a paired bootstrap: a resample draws the same items for both
    systems (Koehn 2004, "Statistical significance tests for machine translation evaluation"), so
    what makes an item hard for both does not widen the interval.

    Args:
        statistics: ``[items, dim]``, of `Task.statistics`.
        baseline: the same of another system; None: of none.
    """
    from scipy.stats import bootstrap

    def score(drawn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        found = task.score(statistics[drawn].sum(-2), drawn.shape[-1])
        return (
            found
            if baseline is None
            else found - task.score(baseline[drawn].sum(-2), drawn.shape[-1])
        )

    items = np.arange(len(statistics))
    estimate = float(score(items))
    if len(items) < 2:
        return {"estimate": estimate, "low": estimate, "high": estimate}
    low, high = bootstrap(
        (items,), score, n_resamples=resamples, method="percentile", vectorized=True, rng=seed
    ).confidence_interval
    return {"estimate": estimate, "low": float(low), "high": float(high)}


def _leak_test(
    items: Sequence[Item], answers: Sequence[str], by_full: Sequence[str]
) -> dict[str, Any]:
    told = list(zip(items, answers, by_full, strict=True))
    leaking = [item.id for item, answer, full in told if leaks(answer, full, item)]
    return {
        "changed_facts": sum(item.stale is not None for item in items),
        "full_states_new_fact": sum(states(full, item.references[0]) for item, _, full in told),
        "leaks": len(leaking),
        "states_donor_fact": sum(
            item.stale is not None and states(answer, item.stale) for item, answer, _ in told
        ),
        "leaking_items": leaking,
    }


def _measure(
    rig: Rig,
    task: Task,
    item: Item,
    methods: Sequence[AnyMethod],
    openers: dict[str, Callable[[], AnswerStore]],
) -> Row:
    donor, target = (encode(rig, text, task.chat) for text in (item.donor, item.target))
    rig.check(donor, target, answer=task.max_new_tokens)
    ns = rig.namespace(f"quality-{task.name}-{item.id}")
    kept = [m for m in methods if isinstance(m, Method)]
    with rig.known(donor, ns) as first:
        served = [rig.serve(target, ns, method, slot) for slot, method in enumerate(kept, 1)]
    # The donor's own answer is only needed where answers are reused.
    batch = [*served, *([first] if openers else [])]
    answers = [
        task.clean(rig.words(tokens))
        for tokens in rig.decode(batch, task.max_new_tokens, lambda t: task.ends(rig.words(t)))
    ]
    results = {
        method.name: {"answer": answer, **one.cost}
        for method, one, answer in zip(kept, served, answers, strict=False)
    }
    for name, open_store in openers.items():
        store = open_store()
        try:
            store.put(item.donor, answers[-1])
            found = store.get(item.target)
        finally:
            store.close()
        # A miss is asked of the model, which computes everything.
        nothing = {"answer": found, "computed_tokens": 0, "work_tokens": 0.0, "declined": None}
        results[name] = results[FULL.name] if found is None else nothing
    return {"tokens": len(target), "methods": results}
