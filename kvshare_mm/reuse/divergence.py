"""How far an edited prompt's answer will be from full recompute, told from the plan alone.

A reused position does harm as far as its KV *drifted* and as far as the prompt's end *looks* at it.
Neither needs a forward pass:

- Where the end looks is known from the donors: when a prompt is prefilled, the attention of its
  last position is kept with it, and prompts that are alike look at the same things. On similar chat
  prompts the donor's attention chooses repairs as well as the target's own would.
- Drift comes from edits: it is as large as the share of a position's context that is another, where
  what is near counts more than what is far (see `reuse.context`).

The product is a position's *risk*. Drifts of different positions point in different directions,
and KL grows with the square of a small error: so risks add up as squares. What the end does not
look at is looked at by what it does look at. There, much that moved a little does harm together,
and the more the larger a share of the prompt it is: documents in another order, in 4,000 tokens as
in 1,000. So a position counts with a little more than the attention to it.

There are two exceptions to all of this, and `MaxDivergence` always repairs both. The first tokens
behind an edit remember what stood before them, and so does the rest of a word that was cut: that is
how a model copies a number later, long after its first token. Stale, they make it drop or change
the last digits, though the first token is right: of order number 5766, 766 of it reused,
SmolLM2-135M made 576 (`kvshare bench quality --task letters`). Behind a large edit they are more:
the prompt's end may not look at them, but what it looks at does. The prompt's end is the other. Its
last positions have *read* the prompt for the question they ask: in the donor's KV they hold the
donor's answer, whatever the attention to them.
On exams with other answers, repairing the last 16 positions and nothing else takes the first
token's KL from 1.1 to 0.01 nats.

What is reused so becomes a donor itself, and its KV is as far off as it was made. Every node
therefore keeps the *drift* of its positions, and whoever takes KV from it starts from there: what
it inherits is added to what its own edits do. A request that continues an approximate one token for
token goes as far as the risk fits its own bound; what it edits, it repairs until the sum does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kvshare_mm.reuse.context import changed_context
from kvshare_mm.reuse.plan import KeptRun, ReusePlan

# Positions at the prompt's end that have read the question.
TAIL = 16
# Positions behind an edit that are always repaired, and how many are at most, as long as more than
# `STALE` of what they read is another: one behind a number in a form, 16 behind turns left out.
FRONT = 1
WINDOW = 16
STALE = 0.2
# An edited word or number is repaired to its end, at most so far.
WORD = 16
# A picture with fewer positions behind it has no question there: it may have read one before it.
_QUESTION = 8

# KL(full || reused) of the first token's distribution, in nats, stays below
# BOUND_SCALE * residual ** BOUND_POWER for 95% of the requests that reuse anything:
# chosen on 12 pairs of similar chat prompts and 80 of long ones with small edits (1,000 to 4,000
# tokens, eleven kinds), at five bounds each, SmolLM2-135M.
BOUND_SCALE = 1950.0
BOUND_POWER = 1.56

# Positions that the prompt's end does not look at are looked at by those that it does. All of a
# prompt's drift counts so, as its mean square, however long the prompt is.
THROUGH_OTHERS = np.float32(1e-5)

# Drift is stored as float16: nothing approximate may be rounded to exact.
_LEAST_DRIFT = np.finfo(np.float16).smallest_subnormal


def drift(plan: ReusePlan) -> np.ndarray:
    """How far the KV of each position will be from full recompute's if it is reused as it is.

    Returns:
        ``[num_tokens]`` float64, at least 0: what it inherits from its donor, and what the edits
        between donor and target add; 0 outside approximate runs.
    """
    found = changed_context(plan).copy()
    if plan.inherited is not None:
        found += np.where(plan.approximate, plan.inherited, 0)
    return found


def looked_at(drift: np.ndarray, attention: np.ndarray, num_tokens: int) -> np.ndarray:
    """Risk: drift times how much it is looked at, by the prompt's end or by what that looks at.
    Nothing is not looked at at all, or drift would vanish from those who tolerate none.

    Args:
        drift: ``[P]``.
        attention: ``[P]``, of the prompt's end.
        num_tokens: of the prompt that these are positions of.
    """
    danger: np.ndarray = drift * np.sqrt(np.square(attention) + THROUGH_OTHERS / num_tokens)
    return danger


def risk(plan: ReusePlan) -> np.ndarray:
    """What each position adds to the divergence if it is reused as it is.

    Returns:
        ``[num_tokens]`` float64, at least 0; 0 outside approximate runs and for KV whose context
        is that of its donor token for token and was exact there.
    """
    attention = plan.attention
    if attention is None:
        attention = np.full(plan.num_tokens, 1 / plan.num_tokens)
    return looked_at(drift(plan), attention, plan.num_tokens)


def harmless(danger: np.ndarray, pictures: np.ndarray) -> None:
    """Take pictures out of `danger`, in place; not those that must not be trusted at all."""
    danger[pictures & np.isfinite(danger)] = 0


def asked_before(pictures: np.ndarray) -> bool:
    """Whether a prompt ends with a picture (``[N]`` bool), so that it may have read a question."""
    return bool(pictures[-_QUESTION:].any())


def fronts(plan: ReusePlan, width: int) -> np.ndarray:
    """The first `width` positions behind every edit, int64."""
    found = [np.arange(run.start, min(run.start + width, run.end)) for run in _behind_edits(plan)]
    return np.concatenate((np.empty(0, np.int64), *found))


def stale_fronts(plan: ReusePlan) -> np.ndarray:
    """The positions behind every edit that remember what stood there, int64: at least `FRONT`, to
    the end of a cut word, and as far as most of what they read nearby is another."""
    found = [np.empty(0, np.int64)]
    changed = changed_context(plan)
    for run in _behind_edits(plan):
        near = changed[run.start : min(run.end, run.start + WINDOW)] > STALE
        reach = max(FRONT, int(np.argmin(np.append(near, False))))
        if plan.joined is not None:
            word = plan.joined[run.start : min(run.end, run.start + WORD)]
            reach = max(reach, int(np.argmin(np.append(word, False))))
        found.append(np.arange(run.start, min(run.start + reach, run.end)))
    return np.concatenate(found)


def _behind_edits(plan: ReusePlan) -> Iterator[KeptRun]:
    end = 0
    for run in plan.runs:
        if not run.exact and not plan.goes_on(end, run):
            yield run
        end = run.end


def passed_on(plan: ReusePlan) -> np.ndarray | None:
    """The drift of a request served with `plan`, as those inherit it who take KV from it.

    What is always to be repaired (behind edits, at the prompt's end) and was not is not trusted by
    anybody who did not ask for that: its drift is infinite.

    Returns:
        ``[num_tokens]`` float16, 0 where KV was computed or is exact; None: it is everywhere.
    """
    reused = plan.reused
    if not reused.any():
        return None
    edited = reused & ~plan.continued
    found = drift(plan)
    found[edited] = np.maximum(found[edited], _LEAST_DRIFT)
    stale = np.zeros(plan.num_tokens, dtype=bool)
    stale[stale_fronts(plan)] = True
    tail = np.zeros(plan.num_tokens, dtype=bool)
    tail[-TAIL:] = True
    if plan.pictures is not None:
        stale &= ~plan.pictures
        tail &= ~plan.pictures | asked_before(plan.pictures)
    found[edited & (stale | tail)] = np.inf
    found[~reused] = 0
    return found.astype(np.float16)


def as_risky_as(drift: np.ndarray, attention: np.ndarray, risk: float) -> np.ndarray:
    """`drift` (``[P]``), scaled so that with this attention it is worth no more than `risk`.

    Where a request looks is guessed when it is planned and known when it was computed. It was found
    good enough by the guess, and whoever asks the same gets the same.
    """
    n = min(len(drift), len(attention))
    danger = looked_at(drift[:n], attention[:n], n)
    found = float(np.sqrt(np.square(danger[np.isfinite(danger)]).sum()))
    if found <= risk:
        return drift
    known = (drift > 0) & np.isfinite(drift)
    scaled = np.where(known, drift, 0) * np.float32(risk / found)
    return np.where(known, np.maximum(scaled, _LEAST_DRIFT), drift)


def riskiest(danger: np.ndarray, limit: float, fixed: np.ndarray) -> np.ndarray:
    """As few positions as leave a residual risk of at most `limit` in the others.

    Args:
        danger: ``[num_tokens]`` risk of each position, at least 0.
        fixed: ``[num_tokens]`` bool: positions that cannot be chosen; their risk counts.

    Returns:
        int64 positions, the riskiest first.
    """
    # What is no number is trusted by nobody.
    danger = np.nan_to_num(danger, nan=np.inf, posinf=np.inf)
    if math.isfinite(limit):
        limit = math.sqrt(max(0.0, limit * limit - float(np.square(danger[fixed]).sum())))
    danger = np.where(fixed, 0, danger)
    order = np.argsort(-danger, kind="stable")
    # What is left if this position and all that are less risky are reused.
    left = np.sqrt(np.cumsum(np.square(danger[order][::-1]))[::-1])
    chosen: np.ndarray = order[(left > limit) & (danger[order] > 0)]
    return chosen


def residual_risk(plan: ReusePlan) -> float:
    """The risk of what `plan` reuses and does not repair: the root of the sum of squares."""
    left = risk(plan)[plan.reused]
    return float(np.sqrt(np.square(left).sum()))


def divergence_bound(residual: float) -> float:
    """The KL (nats) that 95% of requests of this residual risk stay below."""
    return float(BOUND_SCALE * residual**BOUND_POWER)


def risk_within(max_divergence: float) -> float:
    """The largest residual risk whose bound is `max_divergence` (nats)."""
    with np.errstate(over="ignore"):  # any risk is allowed, then
        return float(np.float64(max_divergence / BOUND_SCALE) ** (1 / BOUND_POWER))
