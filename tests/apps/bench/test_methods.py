"""Methods by name, their budgets, and answers from a store."""

from __future__ import annotations

import importlib.util
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.gptcache import GPTCacheStore, counts_as_hit
from kvshare_mm.apps.bench.methods import METHODS, Method, pick, pick_any
from kvshare_mm.apps.bench.policies import AtHand, bench_policies
from kvshare_mm.reuse.repair import make_policy

needs_gptcache = pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("gptcache", "sqlalchemy", "faiss")),
    reason="gptcache is not installed",
)


def nothing(*_: Any) -> Any:
    raise AssertionError("nothing is served here")


NOBODY = AtHand(nothing, nothing, nothing)


def test_every_budget_is_a_policy_and_names_its_point() -> None:
    for method in METHODS.values():
        points = method.at_budgets()
        assert len({p.name for p in points}) == len(points)
        if not method.budgets:
            assert points == (method,)
            continue
        for spec, point in zip(method.budgets, points, strict=True):
            assert (point.repair, point.reuse) == (spec, method.reuse)
            assert point.policy(NOBODY) == make_policy(spec, bench_policies(NOBODY))
            assert point.name == f"{method.name}@{spec}"


def test_methods_that_reuse_answers_are_for_tasks_only() -> None:
    assert [m.name for m in pick_any("full,gptcache")] == ["full", "gptcache"]
    with pytest.raises(ConfigError, match="gptcache"):
        pick("full,gptcache")


def test_methods_by_name() -> None:
    assert [m.name for m in pick("full, epic")] == ["full", "epic"]
    [own] = pick("repair=window:3+tail:2")
    assert (own.reuse, own.repair) == ("similar", "window:3+tail:2")
    assert all(m.repair is None or m.policy() is not None for m in METHODS.values())
    for wrong in ("magic", "", "full,", "repair=magic", "repair=window:x"):
        with pytest.raises(ConfigError):
            pick(wrong)


def test_a_method_named_twice_counts_once() -> None:
    assert [m.name for m in pick("epic,full,epic")] == ["epic", "full"]
    assert all(isinstance(m, Method) for m in pick("repair=window:2,repair=window:2,full"))
    assert len(pick("repair=window:2,repair=window:2,full")) == 2


def test_gptcache_s_default_threshold_is_a_cosine_of_six_tenths() -> None:
    cosine = np.array([1.0, 0.61, 0.59, 0.0, -1.0])
    assert counts_as_hit(cosine).tolist() == [True, True, False, False, False]


@needs_gptcache
def test_gptcache_answers_what_is_near_enough(letters: Any) -> None:
    with closing(GPTCacheStore(letters)) as store, closing(GPTCacheStore(letters)) as other:
        assert store.get("abc") is None
        store.put("aabbc", "first")
        store.put("xyz", "second")
        assert store.get("abbcc") == "first"  # cosine 8/9
        assert store.get("zyx") == "second"
        assert store.get("aqqq") is None  # cosine 0.21
        assert other.get("aabbc") is None  # stores know nothing of each other


@needs_gptcache
@pytest.mark.parametrize("shared", [2, 3, 4, 5])
def test_gptcache_agrees_with_the_rule(letters: Any, shared: int) -> None:
    question, other = "a" * 4 + "b" * 3, "a" * shared + "c" * 3
    with closing(GPTCacheStore(letters)) as store:
        store.put(question, "answer")
        one, two = letters.embed([question, other])
        assert (store.get(other) == "answer") == bool(counts_as_hit(one @ two))


def test_gptcache_installs_nothing_by_itself(letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sqlalchemy"):
        GPTCacheStore(letters)
