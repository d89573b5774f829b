"""Risk of reuse: attention of the prompt's end times the drift that edits cause."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.reuse.divergence import divergence_bound, residual_risk, risk, risk_within
from kvshare_mm.reuse.plan import KeptRun, ReusePlan


def test_by_hand():
    # Four tokens of ten replaced, then two kept, and one more put in before the last kept ones.
    attention = np.linspace(0.05, 0.2, 10)
    runs = (KeptRun("a", 4, 4, 2, False), KeptRun("a", 6, 7, 2, False))
    plan = ReusePlan(10, runs, attention=attention)
    seen = np.log1p([4, 5, 7, 8])
    changed = [
        1,
        (np.log(6) - np.log(2)) / seen[1],
        (np.log(8) - np.log(4) + np.log(2)) / seen[2],
        (np.log(9) - np.log(5) + np.log(3) - np.log(2)) / seen[3],
    ]
    want = np.zeros(10)
    want[[4, 5, 7, 8]] = attention[[4, 5, 7, 8]] * np.array(changed)
    assert risk(plan) == pytest.approx(want)


def test_what_is_repaired_is_no_risk_any_more_and_the_rest_adds_up_as_squares():
    plan = ReusePlan(10, (KeptRun("a", 4, 4, 4, False),), attention=np.full(10, 0.1))
    danger = risk(plan)
    assert residual_risk(plan) == pytest.approx(np.sqrt((danger**2).sum()))
    repaired = replace(plan, repair=np.array([4, 6]))
    assert residual_risk(repaired) == pytest.approx(np.hypot(danger[5], danger[7]))
    assert residual_risk(replace(plan, repair=np.arange(4, 8))) == 0


@given(st.floats(1e-9, 10))
def test_the_bound_and_its_inverse(kl):
    assert divergence_bound(risk_within(kl)) == pytest.approx(kl)
