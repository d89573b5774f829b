"""What is reused: which target positions take their KV from which donor, and which are computed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np


class Decline(StrEnum):
    """Why a request (or the part of it behind its exact prefix) was computed in full."""

    REUSE_OFF = "reuse_off"
    UNSUPPORTED_MODEL = "unsupported_model"
    RECURRENT_LAYERS = "recurrent_layers"
    NO_DONOR = "no_donor"
    BELOW_MIN_GAIN = "below_min_gain"
    EXACT_ONLY = "exact_only"
    LOOKUP_ERROR = "lookup_error"
    DIVERGENCE = "divergence"
    AUDITED = "audited"


@dataclass(frozen=True, slots=True)
class Donor:
    """What the planner may know of a stored request.

    Attributes:
        donor_id: the node's id.
        align_keys: ``[M]`` uint64 alignment keys.
        reusable: ``[M]`` bool, positions whose KV is exact where it was computed, so that it may
            be edited into another context.
        readable: length of the prefix whose KV can be read at all.
        exact_len: length of the prefix that is exact.
        attention: ``[P]`` float32, P <= M: how much its prompt's last position looked at each; None
            if unknown.
        positions: ``[3, M]`` rotary positions; None: the index.
        drift: ``[P]`` float32, P <= M: how far the KV of each position is from what its own context
            gives (see `divergence.passed_on`), 0 behind P; None: nothing is approximate.
        reads: ``[R, 2]`` int32: a position and one far before it that it reads; None: unknown.
    """

    donor_id: str
    align_keys: np.ndarray = field(repr=False)
    reusable: np.ndarray = field(repr=False)
    readable: int
    exact_len: int
    attention: np.ndarray | None = field(default=None, repr=False)
    positions: np.ndarray | None = field(default=None, repr=False)
    drift: np.ndarray | None = field(default=None, repr=False)
    reads: np.ndarray | None = field(default=None, repr=False)


class KeptRun(NamedTuple):
    """Target ``[start, start + length)`` takes the KV of `donor` from `donor_start`.

    Attributes:
        exact: what a full prefill gives.
        continued: approximate, and yet in the very context that it was computed in: the target
            begins with the donor's tokens, up to the end of the run.
        foreign: so many tokens of the prefix (exact and continued, from other donors) stand in the
            target and not in this donor.
    """

    donor: str
    donor_start: int
    start: int
    length: int
    exact: bool
    continued: bool = False
    foreign: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        """Target index minus donor index. Keys move by `turn_of`."""
        return self.start - self.donor_start


@dataclass(frozen=True, slots=True)
class Promise:
    """What is expected of an approximate plan, for an audit to compare with.

    Attributes:
        family: whose experience it is based on, and adds to: the root of its donor's tree.
        asked: largest divergence (nats) that was asked for.
        bound: the divergence that the constants give its residual risk.
        expected: the same after experience: what it stays below in 95% of the cases.
        ruled: whether experience decides about such requests, and learns from them.
        trial: its family is not reused any more, and this is an attempt to find out whether it
            could be.
    """

    family: str
    asked: float
    bound: float
    expected: float
    ruled: bool = True
    trial: bool = False


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """Kept runs and positions to compute for one target.

    Attributes:
        num_tokens: length of the target.
        runs: kept runs, ascending and disjoint; none reaches the last position.
        repair: ``[R]`` ascending int64, positions inside approximate runs that are computed anyway.
        declined: why nothing behind the exact prefix is reused, or None.
        attention: ``[num_tokens]`` float32: how much the donors' last position looked at what each
            kept position takes its KV from, a guess of how much this prompt's will; the average
            where that is unknown. None if nothing is reused approximately.
        inherited: ``[num_tokens]`` float32: how far off what each kept position is taken from was
            made, in its donor already (`Donor.drift`); None: not at all.
        unedited: ``[num_tokens]`` bool: placeholders that stand between two runs of a donor as they
            stand in the donor, whose KV there is not to be had; None: there are none.
        pictures: ``[num_tokens]`` bool: positions that are pictures; None: none are.
        joined: ``[num_tokens]`` bool: positions whose token goes on with the word before it; None:
            unknown.
        reads: ``[R, 2]`` int32: a kept position and one that its KV was computed from, far before
            it; -1 if that is not kept where it was. None: unknown.
        origin: the donor whose approximate reuse was declined, or None.
        promise: what is expected of it; None: nothing is approximate.
        parted: where the target leaves the stored request that begins like it, if that is behind
            what can be gone on from; 0: it is not.
        context: `changed_context` of it, once it was asked for; `replace` does not take it over.
    """

    num_tokens: int
    runs: tuple[KeptRun, ...] = ()
    repair: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    declined: Decline | None = None
    attention: np.ndarray | None = field(default=None, repr=False)
    inherited: np.ndarray | None = field(default=None, repr=False)
    unedited: np.ndarray | None = field(default=None, repr=False)
    pictures: np.ndarray | None = field(default=None, repr=False)
    joined: np.ndarray | None = field(default=None, repr=False)
    reads: np.ndarray | None = field(default=None, repr=False)
    origin: str | None = None
    promise: Promise | None = None
    parted: int = 0
    context: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        end = exact_end = 0
        for run in self.runs:
            if run.start < end or run.length <= 0:
                raise ValueError(f"kept runs overlap or are empty at {run}")
            if run.donor_start < 0:
                raise ValueError(f"a kept run starts before its donor: {run}")
            if run.exact and (run.shift or run.start != exact_end):
                raise ValueError(f"an exact run must continue the exact prefix unshifted: {run}")
            if run.continued and (run.exact or run.shift or run.start != exact_end):
                raise ValueError(f"only behind the exact prefix can a donor be continued: {run}")
            end = run.end
            exact_end = end if run.exact else exact_end
        if self.num_tokens < 1 or end > self.num_tokens - 1:
            raise ValueError("the last position must be computed")

    @property
    def kept(self) -> np.ndarray:
        """``[num_tokens]`` bool: positions inside a kept run, repaired or not."""
        return self._inside(self.runs)

    @property
    def placeholders(self) -> np.ndarray:
        """Ascending int64 positions with no donor KV."""
        return np.flatnonzero(~self.kept)

    @property
    def compute(self) -> np.ndarray:
        """Ascending int64 positions that the model runs on: placeholders and repair positions."""
        computed = ~self.kept
        computed[self.repair] = True
        return np.flatnonzero(computed)

    @property
    def num_exact(self) -> int:
        return sum(r.length for r in self.runs if r.exact)

    @property
    def num_reused(self) -> int:
        """Approximate positions that are reused and not repaired."""
        return sum(r.length for r in self.runs if not r.exact) - len(self.repair)

    @property
    def num_computed(self) -> int:
        return self.num_tokens - self.num_exact - self.num_reused

    @property
    def donors(self) -> tuple[str, ...]:
        """Ids of the donors used, the one that gives most first."""
        given: dict[str, int] = {}
        for run in self.runs:
            given[run.donor] = given.get(run.donor, 0) + run.length
        return tuple(sorted(given, key=lambda d: -given[d]))

    @property
    def edited_from(self) -> str | None:
        """The donor that this is a version of: it gives most of what is approximate, or would have
        if that had not been declined; or it is the beginning of at least half of this."""
        given: dict[str, int] = {}
        for run in self.runs:
            if not run.exact or 2 * run.length >= self.num_tokens:
                given[run.donor] = given.get(run.donor, 0) + run.length
        return self.origin or max(given, key=lambda donor: given[donor], default=None)

    def only_exact(self, declined: Decline) -> ReusePlan:
        """The plan without its approximate runs, and why."""
        exact = tuple(run for run in self.runs if run.exact)
        return ReusePlan(
            self.num_tokens, exact, declined=declined, reads=self.reads, origin=self.edited_from
        )

    def resumed_at(self, length: int, declined: Decline) -> ReusePlan:
        """The exact prefix, cut to the `length` that can be gone on from; why no more is reused."""
        exact = self.runs[0]._replace(length=length) if length else None
        whole = length >= self.num_tokens - 1
        return ReusePlan(
            self.num_tokens,
            (exact,) if exact else (),
            declined=None if whole else declined,
            origin=self.edited_from,
            parted=self.num_exact if self.num_exact > length else 0,
        )

    def with_repair(self, positions: np.ndarray) -> ReusePlan:
        """The same plan with `positions` (any order, duplicates allowed) computed as well.

        Only positions inside approximate runs count: exact ones have nothing to repair and the
        others are computed already. A donor that is continued is taken as it is: what it computed
        behind a position has read that one unrepaired.
        """
        wanted = np.zeros(self.num_tokens, dtype=bool)
        wanted[positions] = True
        return self._of_same_runs(
            repair=np.flatnonzero(wanted & self.approximate & ~self.continued)
        )

    def with_promise(self, promise: Promise) -> ReusePlan:
        """The same plan, and what is expected of it."""
        return self._of_same_runs(promise=promise)

    def _of_same_runs(self, **changes: Any) -> ReusePlan:
        plan = replace(self, **changes)
        object.__setattr__(plan, "context", self.context)
        return plan

    @property
    def approximate(self) -> np.ndarray:
        """``[num_tokens]`` bool: positions inside an approximate run."""
        return self._inside(r for r in self.runs if not r.exact)

    @property
    def reused(self) -> np.ndarray:
        """``[num_tokens]`` bool: approximate positions that are reused as they are."""
        mask = self.approximate
        mask[self.repair] = False
        return mask

    @property
    def continued(self) -> np.ndarray:
        """``[num_tokens]`` bool: positions inside an approximate run that continues its donor."""
        return self._inside(r for r in self.runs if r.continued)

    def goes_on(self, end: int, run: KeptRun) -> bool:
        """Whether between `end`, of the run before, and `run` there is no edit."""
        return run.continued or bool(
            self.unedited is not None and run.start > end and self.unedited[end : run.start].all()
        )

    def _inside(self, runs: Iterable[KeptRun]) -> np.ndarray:
        mask = np.zeros(self.num_tokens, dtype=bool)
        for run in runs:
            mask[run.start : run.end] = True
        return mask


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How approximate KV may be that a request takes over from another one.

    Attributes:
        risk: largest residual risk of it.
        pictures: whether reused pictures count as exact.
    """

    risk: float = math.inf
    pictures: bool = True


@dataclass(frozen=True, slots=True)
class PlannerOptions:
    """When reuse is worth it.

    Attributes:
        min_run: shortest kept run; shorter ones cost more than they save.
        min_gain_tokens: fewest approximate positions worth an edit.
        min_gain_share: the least share of the positions behind the exact prefix that must be kept;
            below it the edits outweigh what is known and the answer would drift.
        exact_only: never reuse approximately.
        tolerance: how approximate a donor may be that the target continues.
        each_axis: keys can be moved by other amounts on each axis of their positions.
        max_seconds: the search for approximate reuse ends when it has worked about so long (for
            each 32,768 tokens of the prompt; the time of its own thread, waiting for others is
            none of it), with the best found until then. What it may look at is bounded too and
            ordinary prompts need far less, so plans do not depend on the clock: it is for prompts
            and machines slower than anybody thought.
    """

    min_run: int = 4
    min_gain_tokens: int = 16
    min_gain_share: float = 0.3
    exact_only: bool = False
    tolerance: Tolerance = field(default_factory=Tolerance)
    each_axis: bool = False
    max_seconds: float = 0.05

    def but_exact_only(self) -> PlannerOptions:
        return replace(self, exact_only=True)


Turn = tuple[int, int, int]
"""By how many positions a key moves on each axis: time, row, column."""


def uniform_shift(
    target: np.ndarray | None, start: int, donor: np.ndarray | None, donor_start: int, length: int
) -> int | None:
    """By how many positions the keys of a run move, the same on all axes; None if they do not.

    Args:
        target, donor: ``[3, N]`` and ``[3, M]`` rotary positions; None: the index.
    """
    turn = turn_of(target, start, donor, donor_start, length)
    return turn[0] if turn is not None and len(set(turn)) == 1 else None


def turn_of(
    target: np.ndarray | None, start: int, donor: np.ndarray | None, donor_start: int, length: int
) -> Turn | None:
    """By how many positions all keys of a run move; None if not all move alike. Args: see
    `uniform_shift`."""
    if target is None and donor is None:
        return (start - donor_start,) * 3
    moved = _positions(target, start, length) - _positions(donor, donor_start, length)
    time, row, column = map(int, moved[:, 0])
    return (time, row, column) if (moved == moved[:, :1]).all() else None


def _positions(positions: np.ndarray | None, start: int, length: int) -> np.ndarray:
    if positions is None:
        return np.arange(start, start + length)[None]
    return positions[:, start : start + length]
