"""The search for approximate reuse: against a plain one, on hostile prompts, and out of time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse import align as align_module
from kvshare_mm.reuse import chain, cover, ranks, runs
from kvshare_mm.reuse.align import align, common_prefix
from kvshare_mm.reuse.plan import Donor, PlannerOptions, ReusePlan, turn_of, uniform_shift
from kvshare_mm.reuse.planner import make_plan

from .plans import blocks, donor_of, maximal_matches, to_keys
from .test_planner_invariants import tasks

Row = tuple[int, int, int, int]


# -- a slow, obvious reference ------------------------------------------------------------------


def slow_cover(target, prefix, donors, options, positions=None) -> list[Row]:
    """Donor number, donor start, start and length: gap by gap and match by match."""
    limit, min_run = len(target) - 1, options.min_run

    def usable(matches, donor, low, high):
        for d, t, n in matches:
            start, end = max(t, low), min(t + n, high)
            if end > start:
                shift = t - d
                for a, b in stretches(donor.reusable[start - shift : end - shift], min_run):
                    yield start - shift + a, start + a, b - a

    def moving(number, found):
        for d, t, n in found:
            if options.each_axis:
                yield from parted(number, d, t, n)
            elif uniform_shift(positions, t, donors[number].positions, d, n) is not None:
                yield number, d, t, n

    def parted(number, d, t, n):
        begun = 0
        for i in range(n + 1):
            here = donors[number].positions, d + begun, i + 1 - begun
            if i < n and turn_of(positions, t + begun, *here) is not None:
                continue
            if i - begun >= min_run:
                yield number, d + begun, t + begun, i - begun
            begun = i

    def reach(donor):
        keys = target[prefix:limit]
        windows = {tuple(w.tolist()) for w in every(donor.align_keys, min_run)}
        known = [tuple(w.tolist()) in windows for w in every(keys, min_run)]
        return sum(any(known[max(0, i - min_run + 1) : i + 1]) for i in range(len(keys)))

    best: list[Row] = []
    covered = 0
    for i in sorted(range(len(donors)), key=lambda i: -reach(donors[i])):
        if best and reach(donors[i]) < covered + options.min_gain_tokens:
            break
        matches = align(donors[i].align_keys, target, min_run)
        found = list(moving(i, usable(matches, donors[i], prefix, limit)))
        if sum(n for *_, n in found) > covered:
            best, covered = found, sum(n for *_, n in found)
    for i, donor in enumerate(donors):
        matches = maximal_matches(donor.align_keys, target, min_run)
        free = np.zeros(len(target), dtype=bool)
        free[prefix:limit] = True
        for _, _, t, n in best:
            free[t : t + n] = False
        taken = []
        for low, high in stretches(free, min_run):
            for d, t, n in sorted(usable(matches, donor, low, high), key=lambda m: -m[2]):
                for a, b in stretches(free[t : t + n], min_run):
                    taken.append((d + a, t + a, b - a))
                    free[t + a : t + b] = False
        best = sorted([*best, *moving(i, taken)], key=lambda r: r[2])
    return best


def every(keys, width):
    return [keys[i : i + width] for i in range(len(keys) - width + 1)]


def stretches(mask, min_run) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= min_run]


@settings(max_examples=300)
@given(tasks())
def test_it_finds_what_the_plain_search_does(task):
    target, donors, options = task
    for prefix in {0, len(target) // 2}:
        found = cover.cover(target, prefix, donors, unhurried(options), None)
        assert [tuple(run) for run in found] == slow_cover(target, prefix, donors, options)


@settings(max_examples=100)
@given(tasks(), st.booleans())
def test_runs_that_do_not_move_as_one_are_left_to_others(task, each_axis):
    target, donors, options = task
    options = dataclasses.replace(options, each_axis=each_axis)

    def bent(n: int, at: int) -> np.ndarray:
        positions = np.tile(np.arange(n), (3, 1))
        positions[1, at:] += 2
        return positions

    donors = [
        dataclasses.replace(d, positions=bent(len(d.align_keys), 5) if i % 2 else None)
        for i, d in enumerate(donors)
    ]
    positions = bent(len(target), 9)
    found = cover.cover(target, 0, donors, unhurried(options), positions)
    assert [tuple(run) for run in found] == slow_cover(target, 0, donors, options, positions)


@pytest.mark.parametrize("seed", range(8))
def test_long_prompts_are_covered_as_by_the_plain_search(seed):
    """Documents in another order, with edits, and donors that have only some of them."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 300, 80) for _ in range(12)]

    def prompt(count: int) -> np.ndarray:
        keys = np.concatenate([documents[i] for i in rng.permutation(12)[:count]])
        keys[rng.integers(0, len(keys), 15)] = rng.integers(0, 300, 15)
        return keys.astype(np.uint64)

    donors = []
    for i in range(4):
        keys = prompt(8)
        donors.append(donor_of(keys, f"d{i}", reusable=rng.random(len(keys)) > 0.05 * (i % 2)))
    target, options = prompt(10), PlannerOptions()
    found = cover.cover(target, 0, donors, unhurried(options), None)
    assert [tuple(run) for run in found] == slow_cover(target, 0, donors, options)
    assert len(found) > 20


def unhurried(options: PlannerOptions) -> PlannerOptions:
    return dataclasses.replace(options, max_seconds=1e9)


# -- prompts made to be slow --------------------------------------------------------------------


def check_valid(plan: ReusePlan, target: np.ndarray, donors: list[Donor]) -> None:
    by_id = {d.donor_id: d for d in donors}
    end = 0
    for run in plan.runs:
        source = by_id[run.donor].align_keys[run.donor_start : run.donor_start + run.length]
        assert run.start >= end
        assert np.array_equal(source, target[run.start : run.end])
        end = run.end
    assert end < len(target)
    assert plan.num_exact == max(
        min(common_prefix(d.align_keys, target), d.exact_len, len(target) - 1) for d in donors
    )


N = 4000


def hostile(name: str) -> tuple[np.ndarray, list[Donor]]:
    """A prompt of about `N` tokens and four donors alike."""
    rng = np.random.default_rng(0)

    def fresh(n: int) -> np.ndarray:
        return rng.integers(1000, 40_000, n)

    kind, size, *_ = name.split()
    number = int(size)
    base, pieces = fresh(N), [fresh(number) for _ in range(N // number)]

    def one() -> np.ndarray:
        if kind == "symbols":
            return rng.integers(0, number, N)
        if kind == "period":
            keys = np.concatenate((fresh(9), np.tile(base[:number], N // number + 1)[:N]))
            if name.endswith("edited"):
                keys[rng.integers(0, N, 20)] = fresh(20)
            return keys
        if kind == "shuffled":
            return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
        keys = base.copy()
        spots = keys[rng.integers(0, number) :: number]
        spots[:] = fresh(len(spots))
        return keys

    return to_keys(one()), [donor_of(one(), f"d{i}") for i in range(4)]


# And the least share of each prompt that is found; of the others, whatever there is.
FAMILIES = {
    **dict.fromkeys(("period 1", "period 5", "period 700", "shuffled 20"), 1.0),
    **dict.fromkeys(("period 5 edited", "period 700 edited"), 0.97),
    "edit 40": 0.9,
    **dict.fromkeys(("period 50", "period 1 edited", "period 50 edited"), 0.0),
    **dict.fromkeys(("symbols 2", "symbols 4", "symbols 12", "symbols 30"), 0.0),
    **dict.fromkeys(("shuffled 6", "edit 7"), 0.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_for_a_hostile_prompt_is_bounded_and_finds_what_there_is(family, monkeypatch):
    """Counted are the pairs, boxes and pieces that are listed, and the pairs that chains weigh."""
    work = {"listed": 0, "weighed": 0}
    pick = chain._pick

    def counted(first, count):
        work["listed"] += int(count.sum())
        return ranks.consecutive(first, count)

    def counted_pick(donor_start, start, length):
        work["weighed"] += length.shape[0] * length.shape[1] ** 2
        return pick(donor_start, start, length)

    for module in (runs, chain, cover):
        monkeypatch.setattr(module, "consecutive", counted)
    monkeypatch.setattr(chain, "_pick", counted_pick)
    # In proportion to the prompt, as it is for a long one.
    monkeypatch.setattr(align_module, "_LEAST_RUNS", 0)
    target, donors = hostile(family)
    plan = make_plan(target, donors, unhurried(PlannerOptions()))
    check_valid(plan, target, donors)
    assert plan.num_exact + plan.num_reused >= FAMILIES[family] * (len(target) - 10)
    assert len(plan.runs) <= cover.MAX_RUNS + 2
    # Pairs of positions would be `N * N` for each donor.
    assert work["listed"] <= len(donors) * 8 * N
    assert work["weighed"] <= len(donors) * align_module.MAX_MATCHES * 96
    # The same once more, and not by chance.
    assert make_plan(target, donors, unhurried(PlannerOptions())).runs == plan.runs


def test_of_too_many_runs_the_longest_are_kept():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 1500)
    parts = [rng.integers(0, 40_000, n).astype(np.uint64) for n in lengths]
    order = rng.permutation(len(parts))
    donor = donor_of(np.concatenate([parts[i] for i in order]))
    plan = make_plan(np.concatenate(parts), [donor], unhurried(PlannerOptions()))
    assert len(plan.runs) == cover.MAX_RUNS
    kept = np.sort([run.length for run in plan.runs])
    # A few neighbours stayed together, and the last position is never kept.
    assert kept.sum() >= np.sort(lengths)[-cover.MAX_RUNS :].sum() - 30


# -- out of time --------------------------------------------------------------------------------


def clock(monkeypatch, step: float) -> list[float]:
    """Each look at the clock takes `step` seconds; returns the looks."""
    looks: list[float] = []

    def thread_time() -> float:
        looks.append(step * len(looks))
        return looks[-1]

    monkeypatch.setattr(cover, "time", SimpleNamespace(thread_time=thread_time))
    return looks


def scattered() -> tuple[np.ndarray, list[Donor]]:
    """An exact prefix, then blocks of which each donor has some, moved ones among them."""
    target = to_keys([*blocks(*"ABCDEFGH"), 0])
    names = {"d0": "ACXBD", "d1": "AXEDFC", "d2": "GXHA", "d3": "XBCHG"}
    return target, [donor_of(blocks(*names[name]), name) for name in names]


def test_without_time_the_exact_prefix_is_all_that_is_reused(monkeypatch):
    clock(monkeypatch, 0.0)
    target, donors = scattered()
    plan = make_plan(target, donors, PlannerOptions(max_seconds=0.0))
    assert [(r.donor, r.start, r.length, r.exact) for r in plan.runs] == [("d0", 0, 20, True)]
    assert make_plan(target, donors[2:], PlannerOptions(max_seconds=0.0)).runs == ()


def test_whenever_the_time_is_over_there_is_a_valid_plan(monkeypatch):
    target, donors = scattered()
    options = PlannerOptions(min_gain_share=0.0)
    best = make_plan(target, donors, unhurried(options))
    assert best.num_computed == 1
    reused = []
    for seconds in range(20):
        looks = clock(monkeypatch, 1.0)
        plan = make_plan(target, donors, dataclasses.replace(options, max_seconds=float(seconds)))
        check_valid(plan, target, donors)
        assert len(looks) <= seconds + 3
        reused.append(plan.num_reused)
    assert reused[:2] == [0, 0]
    # Once all donors are aligned, each moment more only adds.
    assert len(set(reused)) > 3
    assert reused == sorted(reused)
    assert plan.runs == best.runs


def test_a_long_prompt_has_more_time(monkeypatch):
    keys = np.arange(3 * cover.TOKENS_OF_BUDGET, dtype=np.uint64)
    donor = donor_of(keys[5:])
    for length, seconds, found in ((1, 1.0, False), (1, 3.0, True), (3, 1.0, True)):
        clock(monkeypatch, 1.0)
        target = keys[: length * cover.TOKENS_OF_BUDGET]
        options = PlannerOptions(max_seconds=seconds)
        assert bool(make_plan(target, [donor], options).runs) is found
