"""What audits teach: how the factor on the bound moves, for whom, and where that is kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.errors import ConfigError
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.reuse.repair import MaxDivergence, Tail, Union, asked_divergence, with_factor

NS, OTHER = "model-a", "model-b"
ASKED = 0.01


def calibration(path: Path | None = None, audits: bool = True) -> Calibration:
    return Calibration(Counter(), path, audits)


def teach(
    known: Calibration, times: int, off: float, family: str = "f", ns: str = NS, fact: bool = False
) -> None:
    """Audits whose divergence was `off` times what the constants said, of plans that used all that
    the factor allowed."""
    for _ in range(times):
        bound = ASKED / known.verdict(ns, family).factor
        known.observe(ns, family, observed=off * bound, bound=bound, asked=ASKED, fact=fact)


def test_safe_families_loosen_and_unsafe_ones_tighten() -> None:
    known = calibration()
    teach(known, 30, 0.01, "forms")
    teach(known, 30, 3.0, "exams")
    forms, exams = (known.verdict(NS, family).factor for family in ("forms", "exams"))
    assert forms < 0.2
    assert exams > 3
    new = known.verdict(NS, "new").factor
    assert forms < new, "one safe family makes no other one as safe"


def test_namespaces_do_not_learn_from_each_other() -> None:
    known = calibration()
    teach(known, 30, 0.01)
    assert known.verdict(OTHER, "f").factor == pytest.approx(1)


@settings(deadline=None, max_examples=12)
@given(st.floats(-4, 2), st.floats(0.2, 2), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_in_the_long_run_one_in_twenty_misses(
    off: float, spread: float, families: int, seed: int
) -> None:
    """Whatever the model, and though it becomes another one in the middle."""
    rng = np.random.default_rng(seed)
    known, misses, audits, shut, least = calibration(), 0, 0, False, 1.0
    for step in range(800):
        family = f"{rng.integers(families)}-{step // 400}"
        verdict = known.verdict(NS, family)
        shut, least = shut or verdict.shut, min(least, verdict.factor)
        if verdict.shut:
            continue
        bound = ASKED / verdict.factor
        shift = 1.5 if step >= 400 else 0.0
        observed = bound * float(np.exp(rng.normal(off + shift, spread)))
        audits += 1
        misses += known.observe(NS, family, observed=observed, bound=bound, asked=ASKED)
    # As far as the correction may go, by how far an audit moves it.
    assert misses <= 0.05 * audits + 15
    if not shut and least > 1 / 300:
        assert misses >= 0.05 * audits - 15


def test_requests_that_could_not_miss_do_not_make_up_for_those_that_do() -> None:
    """Nine of ten are far below what they ask for; of all, 95% are within what was expected."""
    rng = np.random.default_rng(0)
    known, beyond = calibration(), []
    for step in range(1200):
        factor = known.verdict(NS, "f").factor
        expected = ASKED if step % 10 == 0 else ASKED / 1000
        bound = expected / factor
        observed = bound * float(np.exp(rng.normal(-2, 1)))
        found = {"observed": observed, "bound": bound, "asked": ASKED}
        known.observe(NS, "f", **found, expected=expected)
        beyond.append(observed > expected)
    assert np.mean(beyond[400:]) == pytest.approx(0.05, abs=0.015)


def test_a_changed_fact_is_a_miss_whatever_the_divergence() -> None:
    known = calibration()
    bound = {"observed": 0.0, "bound": 0.005, "asked": ASKED}
    assert known.observe(NS, "f", **bound, fact=True)
    assert not known.observe(NS, "g", **bound)
    assert known.verdict(NS, "f").factor > known.verdict(NS, "g").factor
    assert [(f.audits, f.misses) for f in known.report()] == [(1, 1), (1, 0)]


def test_a_family_that_misses_again_and_again_is_given_up_and_tried_rarely() -> None:
    known = calibration()
    teach(known, 40, 0.5, "good")
    # Their bound says nothing about them: a policy that repairs nothing.
    for _ in range(3):
        known.observe(NS, "bad", observed=0.5, bound=100.0, asked=ASKED)
    assert known.verdict(NS, "bad").shut
    assert not known.verdict(NS, "good").shut
    seen = [known.verdict(NS, "bad") for _ in range(100)]
    assert [v.trial for v in seen].count(True) == 3
    assert all(v.shut != v.trial for v in seen)


def test_a_family_that_became_better_comes_back() -> None:
    known = calibration()
    for _ in range(3):
        known.observe(NS, "f", observed=0.5, bound=100.0, asked=ASKED)
    for _ in range(1000):
        verdict = known.verdict(NS, "f")
        if verdict.trial:
            known.observe(NS, "f", observed=0.001, bound=0.005, asked=ASKED, trial=True)
    assert not known.verdict(NS, "f").shut


def test_a_family_that_fails_its_trials_is_tried_less_and_less() -> None:
    known = calibration()
    trials = []
    for step in range(3000):
        verdict = known.verdict(NS, "f")
        if not verdict.shut:
            found = {"observed": 0.5, "bound": 100.0, "asked": ASKED}
            known.observe(NS, "f", **found, trial=verdict.trial)
            trials += [step] if verdict.trial else []
    apart = np.diff(trials)
    assert len(trials) > 3
    assert (np.diff(apart) >= 0).all() and apart[-1] > apart[0]


def test_without_audits_nobody_is_tried() -> None:
    known = calibration(audits=False)
    for _ in range(3):
        known.observe(NS, "f", observed=0.5, bound=100.0, asked=ASKED)
    assert all(known.verdict(NS, "f").shut for _ in range(200))


def test_no_audit_makes_zero_anything_but_exact() -> None:
    known = calibration()
    teach(known, 100, 1e-5)
    strict = with_factor(MaxDivergence(0.0), known.verdict(NS, "f").factor)
    assert strict.tolerance.risk == 0


def test_a_factor_is_for_bounds_alone() -> None:
    assert with_factor(Tail(4), 7.0) == Tail(4)
    both = with_factor(Union((MaxDivergence(0.03), Tail(4))), 7.0)
    assert both == Union((MaxDivergence(0.03, 7.0), Tail(4)))
    assert asked_divergence(both) == 0.03
    assert asked_divergence(Tail(4)) is None
    tighter = with_factor(MaxDivergence(0.03), 3.0).tolerance
    assert tighter.risk == pytest.approx(MaxDivergence(0.01).tolerance.risk)
    assert tighter.pictures == MaxDivergence(0.03).tolerance.pictures


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store" / "calibration.json"
    known = calibration(path)
    teach(known, 20, 0.01)
    known.save()
    again = calibration(path)
    assert again.report() == known.report()
    assert again.verdict(NS, "f") == known.verdict(NS, "f")
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"version": state["version"] - 1}))
    counters: Counter[str] = Counter()
    assert Calibration(counters, path).empty, "scores of another bound"
    assert counters == {"calibration_unreadable": 1}


@settings(deadline=None)
@given(st.data())
def test_no_flipped_bit_is_learned_from(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flipped") / "calibration.json"
    known = calibration(path)
    teach(known, 3, 0.01)
    known.save()
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    counters: Counter[str] = Counter()
    again = Calibration(counters, path)
    assert again.empty == (counters == {"calibration_unreadable": 1})
    if again.empty:
        [aside] = path.parent.iterdir()
        assert aside.read_bytes() == content, "what was learned is not written over"
    else:
        assert again.report() == known.report()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "namespaces": {}}', "\x00"])
def test_a_file_that_cannot_be_read_is_ignored_and_counted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    counters: Counter[str] = Counter()
    assert Calibration(counters, path).verdict(NS, "f").factor == pytest.approx(1)
    assert counters == {"calibration_unreadable": 1}


def test_a_folder_that_cannot_be_written_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counters: Counter[str] = Counter()
    known = Calibration(counters, tmp_path / "file" / "calibration.json")
    teach(known, 1, 1.0)
    known.save()
    assert counters["calibration_not_written"] == 1


def test_every_namespace_of_a_model_begins_with_what_was_learned_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    known = calibration()
    teach(known, 30, 0.01)
    known.save(path)
    fresh = calibration()
    fresh.start_from(path, "model")
    assert fresh.verdict(OTHER, "new").factor < 1
    teach(fresh, 1, 1.0, ns=OTHER)
    assert fresh.verdict("model-c", "f") == known.verdict(NS, "f")
    with pytest.raises(ConfigError, match="another model"):
        fresh.start_from(path, "mode")
    with pytest.raises(ConfigError, match="cannot be used"):
        fresh.start_from(tmp_path / "nothing.json", "model")


def test_it_does_not_grow_with_traffic(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    known = calibration()
    for ns in range(300):
        teach(known, 1, 1.0, ns=f"model-{ns}")
    for family in range(300):
        teach(known, 60 if family == 299 else 1, 1.0, f"f{family}")
    assert len({f.namespace for f in known.report()}) == 256
    assert len([f for f in known.report() if f.namespace == NS]) == 256
    known.save(path)
    assert path.stat().st_size < 1 << 18


def test_a_look_is_no_trial() -> None:
    known = calibration()
    teach(known, 6, 50.0)
    assert known.verdict(NS, "f").shut
    looks = [known.verdict(NS, "f", look_only=True) for _ in range(200)]
    assert all(look.shut and not look.trial for look in looks)


def test_namespaces_that_nobody_audited_take_no_memory() -> None:
    known = calibration()
    for salt in range(1000):
        known.verdict(f"{NS}{salt}")
    assert len(known._forecasts) == 1
