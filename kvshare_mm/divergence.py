"""How far an edited prompt's answer will be from full recompute, told from the plan alone.

A reused position does harm as far as its KV *drifted* and as far as the prompt's end *looks* at it.
Neither needs a forward pass:

- Where the end looks is known from the donors: when a prompt is prefilled, the attention of its
  last position is kept with it, and prompts that are alike look at the same things. On similar chat
  prompts the donor's attention chooses repairs as well as the target's own would.
- Drift comes from edits: it is largest right behind one, fades with the distance, and grows with
  the share of the context that changed. The exponents are those, of the few tried, that spend
  least on forms while chat prompts diverge no more at one cost.

The product is a position's *risk*. Drifts of different positions point in different directions,
and KL grows with the square of a small error: so risks add up as squares, and many small ones do
little harm.

There are two exceptions to all of this, and `MaxDivergence` always repairs both. The first tokens
behind an edit remember what stood before them, and so does the rest of a word that was cut: that is
how a model copies a number later, long after its first token. Stale, they make it drop or change
the last digits, though the first token is right: of order number 5766, 766 of it reused,
SmolLM2-135M made 576 (`kvshare bench quality --task letters`). The prompt's end is the other. Its
last positions have *read* the prompt for the question they ask: in the donor's KV they hold the
donor's answer, whatever the attention to them.
On exams with other answers, repairing the last 16 positions and nothing else takes the first
token's KL from 1.1 to 0.01 nats.
"""

from __future__ import annotations

import numpy as np

from kvshare_mm.plan import ReusePlan

# Positions at the prompt's end that have read the question.
TAIL = 16
# Positions behind an edit that remember the token before them. One is enough on SmolLM2-135M.
FRONT = 2
# An edited word or number is repaired to its end, at most so far.
WORD = 16
_DISTANCE_POWER = -0.5
_CHANGED_POWER = 1.4

# KL(full || reused) of the first token's distribution, in nats, stays below
# BOUND_SCALE * residual ** BOUND_POWER for 95% of the requests that reuse anything:
# `kvshare bench calibrate` on 132 pairs of similar chat prompts, SmolLM2-135M.
BOUND_SCALE = 139.0
BOUND_POWER = 0.93


def risk(plan: ReusePlan) -> np.ndarray:
    """What each position adds to the divergence if it is reused as it is.

    Returns:
        ``[num_tokens]`` float64, at least 0; 0 outside approximate runs and in runs whose context
        is that of their donor token for token.
    """
    found = np.zeros(plan.num_tokens)
    attention = plan.attention
    changed = end = shift = 0
    for run in plan.runs:
        # Tokens put in, taken out or replaced since the run before.
        changed += max(run.start - end, abs(run.shift - shift))
        end, shift = run.end, run.shift
        if run.exact:
            continue
        share = np.minimum(1.0, changed / (np.arange(run.start, run.end) + 1))
        drift = share**_CHANGED_POWER * (1.0 + np.arange(run.length)) ** _DISTANCE_POWER
        looked = 1 / plan.num_tokens if attention is None else attention[run.start : run.end]
        found[run.start : run.end] = drift * looked
    return found


def residual_risk(plan: ReusePlan) -> float:
    """The risk of what `plan` reuses and does not repair: the root of the sum of squares."""
    left = risk(plan)
    left[plan.repair] = 0
    return float(np.sqrt(np.square(left).sum()))


def divergence_bound(residual: float) -> float:
    """The KL (nats) that 95% of requests of this residual risk stay below."""
    return float(BOUND_SCALE * residual**BOUND_POWER)


def risk_within(max_divergence: float) -> float:
    """The largest residual risk whose bound is `max_divergence` (nats)."""
    with np.errstate(over="ignore"):  # any risk is allowed, then
        return float(np.float64(max_divergence / BOUND_SCALE) ** (1 / BOUND_POWER))
