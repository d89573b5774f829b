"""How far an edited prompt's answer will be from full recompute, told from the plan alone.

A reused position does harm as far as its KV *drifted* and as far as the prompt's end *looks* at it.
Neither needs a forward pass:

- Where the end looks is known from the donors: when a prompt is prefilled, the attention of its
  last position is kept with it, and prompts that are alike look at the same things. On similar chat
  prompts the donor's attention chooses repairs as well as the target's own would.
- Drift comes from edits: it is largest right behind one, fades with the distance, and grows with
  the share of the context that changed. The exponents are those, of the few tried, that gave
  the least divergence at one cost.

The sum of the products over what is reused and not repaired is the *risk*. `MaxDivergence` bounds
the first token's KL by it; its constants come from about 50 pairs of similar chat prompts each on
SmolLM2-135M and Qwen2.5-0.5B, the same that the policy was chosen on.
"""

from __future__ import annotations

import numpy as np

from kvshare_mm.plan import ReusePlan

_DISTANCE_POWER = -0.5
_CHANGED_POWER = 0.3

# KL(full || reused) of the first token's distribution, in nats, stays below
# BOUND_SCALE * risk ** BOUND_POWER for 95% of requests.
BOUND_SCALE = 1.65
BOUND_POWER = 1.0


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
        drift = (1.0 + np.arange(run.length)) ** _DISTANCE_POWER * share**_CHANGED_POWER
        looked = 1 / plan.num_tokens if attention is None else attention[run.start : run.end]
        found[run.start : run.end] = drift * looked
    return found


def divergence_bound(total_risk: float) -> float:
    """The KL (nats) that 95% of requests of this risk stay below."""
    return float(BOUND_SCALE * total_risk**BOUND_POWER)


def risk_within(max_divergence: float) -> float:
    """The largest risk whose bound is `max_divergence` (nats)."""
    return float((max_divergence / BOUND_SCALE) ** (1 / BOUND_POWER))
