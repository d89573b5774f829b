"""Repair policies: which kept positions are computed anyway, because their donor KV is not trusted.

A policy is one small frozen class with its parameters as fields. It sees the plan and nothing else:
what is repaired is known before anything runs, in either engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from kvshare_mm.reuse.dependents import dependents
from kvshare_mm.reuse.divergence import (
    TAIL,
    asked_before,
    fronts,
    harmless,
    looked_at,
    risk,
    risk_within,
    riskiest,
    stale_fronts,
)
from kvshare_mm.reuse.plan import Decline, ReusePlan, Tolerance

# Nats that a reused picture may be worth; it was 0.0002 at the worst token of an answer.
PICTURE_KL = 0.001
# What is reused in the end is worth that all behind it is approximate from so many positions on.
_MIN_REUSED = 16
_MIN_REUSED_SHARE = 0.1
# Policies joined by a plus: each costs a request its time, and strangers may ask for them.
_MAX_PARTS = 8
# Nats that the default policy keeps to, and that others take over from approximate donors.
_DEFAULT_KL = 0.01


class RepairPolicy(Protocol):
    """Chooses repair positions for a plan."""

    @property
    def tolerance(self) -> Tolerance:
        """How approximate the KV of a donor may be that a request with this policy takes over."""

    def positions(self, plan: ReusePlan) -> np.ndarray:
        """Positions to compute, any order; those outside approximate runs are ignored."""


@dataclass(frozen=True, slots=True)
class NoRepair:
    """Placeholders only: the paper's method (arXiv 2503.16525 v1). Takes whatever there is."""

    tolerance: ClassVar[Tolerance] = Tolerance()

    def positions(self, plan: ReusePlan) -> np.ndarray:
        return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class BoundaryWindow:
    """The first `width` positions of every approximate run: those that look back on an edit.

    This is what EPIC recomputes of each chunk (arXiv 2410.15332).
    """

    width: int = 8
    tolerance: ClassVar[Tolerance] = Tolerance(risk_within(_DEFAULT_KL))

    def __post_init__(self) -> None:
        _check_not_negative("width", self.width)

    def positions(self, plan: ReusePlan) -> np.ndarray:
        return fronts(plan, self.width)


@dataclass(frozen=True, slots=True)
class Tail:
    """The last `width` positions of the prompt: those that the first token attends with."""

    width: int = 16
    tolerance: ClassVar[Tolerance] = Tolerance(risk_within(_DEFAULT_KL))

    def __post_init__(self) -> None:
        _check_not_negative("width", self.width)

    def positions(self, plan: ReusePlan) -> np.ndarray:
        return np.arange(max(0, plan.num_tokens - self.width), plan.num_tokens)


@dataclass(frozen=True, slots=True)
class MaxDivergence:
    """As few repairs as keep the first token's divergence from full recompute below a target.

    The prompt's end, the first positions behind every edit and the rest of an edited word, then the
    riskiest ones (see `divergence`) until what is left is worth `kl` nats at most, for 95% of the
    requests that its constants were fitted to. Costs no forward pass.

    Pictures are trusted as they are, unless the target is below `PICTURE_KL`. On a Qwen2.5-VL of 3
    million weights, 160 similar requests whose picture had moved, all harm came from the text:
    without repairs in the picture the answer's tokens diverge by 0.00002 nats, and recomputing the
    whole picture makes no difference. Where the question must stand in front of the picture, the
    prompt's end is repaired even in it.

    Experience says by what `factor` the bound's constants are too low for a model and its traffic
    (see `calibration`); below 1, they are too high.
    """

    kl: float = _DEFAULT_KL
    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("kl", self.kl)

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(risk_within(self.kl / self.factor), pictures=self.kl >= PICTURE_KL)

    def positions(self, plan: ReusePlan) -> np.ndarray:
        tail = Tail(TAIL).positions(plan)
        if not self.kl:  # a promise that no estimate can give
            return np.concatenate((tail, np.flatnonzero(plan.approximate & ~plan.continued)))
        behind, danger = stale_fronts(plan), risk(plan)
        if plan.pictures is not None and self.tolerance.pictures:
            behind = behind[~plan.pictures[behind]]
            harmless(danger, plan.pictures)
            if not asked_before(plan.pictures):
                tail = tail[~plan.pictures[tail]]
        always = np.concatenate((tail, behind, dependents(plan)))
        always = always[~plan.continued[always]]
        danger[always] = 0
        return np.concatenate((riskiest(danger, self.tolerance.risk, plan.continued), always))


@dataclass(frozen=True, slots=True)
class Union:
    """Everything that any of `policies` wants."""

    policies: tuple[RepairPolicy, ...]

    @property
    def tolerance(self) -> Tolerance:
        each = [p.tolerance for p in self.policies]
        return Tolerance(min(t.risk for t in each), all(t.pictures for t in each))

    def positions(self, plan: ReusePlan) -> np.ndarray:
        return np.concatenate([p.positions(plan) for p in self.policies])


def with_factor(policy: RepairPolicy, factor: float) -> RepairPolicy:
    """A policy whose bounds on divergence, if it has any, are stricter by a factor."""
    if isinstance(policy, Union):
        return Union(tuple(with_factor(part, factor) for part in policy.policies))
    return replace(policy, factor=factor) if isinstance(policy, MaxDivergence) else policy


def asked_divergence(policy: RepairPolicy) -> float | None:
    """The divergence (nats) that a policy keeps to; None: it promises none."""
    if isinstance(policy, Union):
        found = [kl for part in policy.policies if (kl := asked_divergence(part)) is not None]
        return min(found, default=None)
    return policy.kl if isinstance(policy, MaxDivergence) else None


def repaired_plan(plan: ReusePlan, policy: RepairPolicy) -> ReusePlan:
    """The plan with its repairs. Where nearly all is repaired, or little was there, the rest is
    computed as well: it costs little more, the answer is exact, and so is what later requests find
    here."""
    if not plan.num_reused:
        return plan
    wanted = policy.positions(plan)
    repaired = plan.with_repair(np.concatenate((wanted, _not_tolerated(plan, wanted, policy))))
    if repaired.num_reused < max(_MIN_REUSED, _MIN_REUSED_SHARE * plan.num_reused):
        return plan.only_exact(Decline.DIVERGENCE)
    return repaired


def _not_tolerated(plan: ReusePlan, repaired: np.ndarray, policy: RepairPolicy) -> np.ndarray:
    """What has to be repaired of what donors were approximate in already, beside `repaired`."""
    if plan.inherited is None or plan.attention is None:
        return np.empty(0, np.int64)
    danger = looked_at(plan.inherited, plan.attention, plan.num_tokens)
    danger[repaired] = 0
    if plan.pictures is not None and policy.tolerance.pictures:
        harmless(danger, plan.pictures)
    return riskiest(danger, policy.tolerance.risk, plan.continued)


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be a number of at least 0, not {value}")


def _no_repair(argument: str) -> NoRepair:
    if argument:
        raise ValueError("it takes no parameter")
    return NoRepair()


_POLICIES: dict[str, Callable[[str], RepairPolicy]] = {
    "none": _no_repair,
    "window": lambda a: BoundaryWindow(int(a or 8)),
    "tail": lambda a: Tail(int(a or 16)),
    "auto": lambda a: MaxDivergence(float(a or _DEFAULT_KL)),
}


def make_policy(
    spec: str, others: Mapping[str, Callable[[str], RepairPolicy]] | None = None
) -> RepairPolicy:
    """A policy from its text form, e.g. ``window:8`` or ``auto:0.02+tail:8``.

    Args:
        others: makers of policies beside the project's own, by name, from what stands behind the
            colon.

    Raises:
        ValueError: unknown policy, or a parameter that is no number of its kind or out of range.
    """
    known = {**_POLICIES, **(others or {})}
    policies = []
    if spec.count("+") >= _MAX_PARTS:
        raise ValueError(f"a repair policy has at most {_MAX_PARTS} parts")
    for part in spec.split("+"):
        name, _, argument = part.strip().partition(":")
        if name not in known:
            raise ValueError(f"repair policy {name!r} is none of {', '.join(known)}")
        try:
            policies.append(known[name](argument))
        except ValueError as error:
            raise ValueError(f"repair policy {part.strip()!r}: {error}") from error
    return policies[0] if len(policies) == 1 else Union(tuple(policies))


def policy_of(repair: str | None, max_divergence: float | None) -> RepairPolicy | None:
    """The policy that two ways of asking for one name; None if neither is used.

    Args:
        repair: as `make_policy` takes it.
        max_divergence: largest first-token KL in nats, short for ``auto:KL``.

    Raises:
        ValueError: both are given, or one of them is wrong.
    """
    if max_divergence is None:
        return None if repair is None else make_policy(repair)
    if repair is not None:
        raise ValueError("max_divergence is short for repair='auto:KL'; give one of the two")
    return MaxDivergence(max_divergence)
