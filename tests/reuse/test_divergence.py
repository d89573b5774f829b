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
    plan = ReusePlan(
        10, (KeptRun("a", 4, 4, 2, False), KeptRun("a", 6, 7, 2, False)), attention=np.full(10, 0.1)
    )
    seen = np.log1p([4, 5, 7, 8])
    changed = [
        1,
        (np.log(6) - np.log(2)) / seen[1],
        (np.log(8) - np.log(4) + np.log(2)) / seen[2],
        (np.log(9) - np.log(5) + np.log(3) - np.log(2)) / seen[3],
    ]
    assert risk(plan)[[4, 5, 7, 8]] == pytest.approx(0.1 * np.array(changed))
    assert risk(plan).sum() == pytest.approx(0.1 * sum(changed))


def test_attention_scales_the_risk():
    plan = ReusePlan(10, (KeptRun("a", 4, 4, 4, False),))
    attention = np.full(10, 0.1, np.float32)
    attention[6] = 0.3
    uneven = risk(replace(plan, attention=attention))
    assert uneven[6] == pytest.approx(3 * risk(plan)[6])
    assert uneven[[4, 5, 7]] == pytest.approx(risk(plan)[[4, 5, 7]])


def test_what_continues_a_prefix_token_for_token_is_no_risk():
    plan = ReusePlan(30, (KeptRun("a", 0, 0, 10, True), KeptRun("b", 10, 10, 15, False)))
    assert not risk(plan).any()


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
