"""The reuse plan: which target positions take their KV from which donor, and which are computed.

Planning is arithmetic on keys: no tensors, no store, no text. The order of trust is fixed:

1. the longest prefix that is token-identical to a donor's and exact there is reused exactly;
2. what follows is aligned with every candidate; the one that covers most becomes the primary
   donor, the others fill the gaps it leaves (the paper's "combine", section 4.2);
3. the last position is always computed, because its hidden state gives the first token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from kvshare_mm.align import align, common_prefix
from kvshare_mm.cover import cover
from kvshare_mm.divergence import Tolerance, harmless, looked_at


class Decline(StrEnum):
    """Why a request (or the part of it behind its exact prefix) was computed in full."""

    SHARING_OFF = "sharing_off"
    UNSUPPORTED_MODEL = "unsupported_model"
    NO_DONOR = "no_donor"
    BELOW_MIN_GAIN = "below_min_gain"
    EXACT_ONLY = "exact_only"
    LOOKUP_ERROR = "lookup_error"
    DIVERGENCE = "divergence"


@dataclass(frozen=True, slots=True)
class Donor:
    """What the planner may know of a stored request.

    Attributes:
        donor_id: the node's id.
        keys: ``[M]`` uint64 alignment keys.
        material: ``[M]`` bool, positions whose KV is exact where it was computed, so that it may
            be edited into another context.
        readable: length of the prefix whose KV can be read at all.
        exact_len: length of the prefix that is exact.
        attention: ``[P]`` float32, P <= M: how much its prompt's last position looked at each; None
            if unknown.
        positions: ``[3, M]`` rotary positions; None: the index.
        drift: ``[P]`` float32, P <= M: how far the KV of each position is from what its own context
            gives (see `divergence.passed_on`), 0 behind P; None: nothing is approximate.
    """

    donor_id: str
    keys: np.ndarray = field(repr=False)
    material: np.ndarray = field(repr=False)
    readable: int
    exact_len: int
    attention: np.ndarray | None = field(default=None, repr=False)
    positions: np.ndarray | None = field(default=None, repr=False)
    drift: np.ndarray | None = field(default=None, repr=False)


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
        """Target index minus donor index. What keys are turned by is told by `one_turn`."""
        return self.start - self.donor_start


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

    def only_exact(self, declined: Decline) -> ReusePlan:
        """The plan without its approximate runs, and why."""
        return ReusePlan(self.num_tokens, tuple(r for r in self.runs if r.exact), declined=declined)

    def with_repair(self, positions: np.ndarray) -> ReusePlan:
        """The same plan with `positions` (any order, duplicates allowed) computed as well.

        Only positions inside approximate runs count: exact ones have nothing to repair and the
        others are computed already. A donor that is continued is taken as it is: what it computed
        behind a position has read that one unrepaired.
        """
        wanted = np.zeros(self.num_tokens, dtype=bool)
        wanted[positions] = True
        return replace(self, repair=np.flatnonzero(wanted & self.approximate & ~self.continued))

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
class PlannerOptions:
    """When reuse is worth it.

    Attributes:
        min_run: shortest kept run; shorter ones cost more than they save.
        min_gain_tokens: fewest approximate positions worth an edit.
        min_gain_share: the least share of the positions behind the exact prefix that must be kept;
            below it the edits outweigh what is known and the answer would drift.
        exact_only: never reuse approximately.
        tolerance: how approximate a donor may be that the target continues.
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
    max_seconds: float = 0.05

    def but_exact_only(self) -> PlannerOptions:
        return replace(self, exact_only=True)


def one_turn(
    target: np.ndarray | None, start: int, donor: np.ndarray | None, donor_start: int, length: int
) -> int | None:
    """By how many positions the keys of a run move, the same on all axes; None if they do not.

    Args:
        target, donor: ``[3, N]`` and ``[3, M]`` rotary positions; None: the index.
    """
    if target is None and donor is None:
        return start - donor_start
    moved = _positions(target, start, length) - _positions(donor, donor_start, length)
    turn = int(moved.flat[0])
    return turn if (moved == turn).all() else None


def _positions(positions: np.ndarray | None, start: int, length: int) -> np.ndarray:
    if positions is None:
        return np.arange(start, start + length)[None]
    return positions[:, start : start + length]


def make_plan(
    target: np.ndarray,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: np.ndarray | None = None,
    pictures: np.ndarray | None = None,
) -> ReusePlan:
    """Plan the reuse of `donors` for a target.

    A run is kept only if its rotary positions move as one. Equal keys see to that: a medium's key
    names its grid, so what is equal is laid out equally.

    Args:
        target: ``[N]`` uint64 keys.
        donors: the better candidates first.
        options: when reuse is worth it.
        positions: ``[3, N]`` rotary positions of the target; None: the index.
        pictures: ``[N]`` bool: positions that are pictures; None: none are.
    """
    n = len(target)
    runs, too_loose = _prefix_runs(target, donors, options, positions, pictures)
    prefix = runs[-1].end if runs else 0
    rest: list[KeptRun] = []
    declined: Decline | None = None
    if options.exact_only:
        declined = None if prefix >= n - 1 else Decline.EXACT_ONLY
    elif prefix < n - 1:
        rest = _approximate_runs(target, prefix, donors, options, positions)
        if not rest and not runs:
            declined = Decline.BELOW_MIN_GAIN if donors else Decline.NO_DONOR
        if sum(r.length for r in rest) < max(
            options.min_gain_tokens, options.min_gain_share * (n - prefix)
        ):
            declined = Decline.BELOW_MIN_GAIN if rest else declined
            declined = Decline.DIVERGENCE if too_loose else declined
            rest = []
        rest = _with_foreign(target, prefix, rest, donors, options.min_run)
    return _made(target, (*runs, *rest), donors, declined, pictures)


def _with_foreign(
    target: np.ndarray, prefix: int, runs: list[KeptRun], donors: Sequence[Donor], min_run: int
) -> list[KeptRun]:
    """The runs behind the prefix with what of the prefix their donors do not have."""
    keys = {d.donor_id: d.keys for d in donors}
    foreign: dict[str, int] = {}
    for run in runs:
        if run.donor not in foreign:
            mine = keys[run.donor]
            begun = min(common_prefix(mine, target), prefix)
            there = mine[begun : max(begun, run.donor_start)]
            found = align(there, target[begun:prefix], min_run) if begun < prefix else []
            foreign[run.donor] = prefix - begun - sum(match.length for match in found)
    return [run._replace(foreign=foreign[run.donor]) for run in runs]


def _made(
    target: np.ndarray,
    runs: tuple[KeptRun, ...],
    donors: Sequence[Donor],
    declined: Decline | None,
    pictures: np.ndarray | None,
) -> ReusePlan:
    """The plan of these runs, with what is known of what they are taken from."""
    n = len(target)
    attention = inherited = unedited = None
    if not all(run.exact for run in runs):
        attention = np.full(n, 1 / n, np.float32)
        looked = {d.donor_id: d.attention for d in donors}
        _carry(attention, runs, looked)
        _look_from_the_end(attention, runs, looked)
        if any(d.drift is not None for d in donors):
            drifts = {d.donor_id: d.drift for d in donors}
            inherited = np.zeros(n, np.float32)
            _carry(inherited, runs, drifts)
            _carry_what_was_read(inherited, runs, drifts)
            unedited = _unedited(target, runs, {d.donor_id: d.keys for d in donors})
    return ReusePlan(
        n,
        runs,
        declined=declined,
        attention=attention,
        inherited=inherited,
        unedited=unedited,
        pictures=pictures,
    )


def _carry(
    into: np.ndarray, runs: Iterable[KeptRun], known: Mapping[str, np.ndarray | None]
) -> None:
    """Put what is known of donors' positions where approximate runs take their KV to."""
    for run in runs:
        values = known[run.donor]
        if values is not None and not run.exact:
            part = values[run.donor_start : run.donor_start + run.length]
            into[run.start : run.start + len(part)] = part


def _look_from_the_end(
    attention: np.ndarray, runs: Iterable[KeptRun], known: Mapping[str, np.ndarray | None]
) -> None:
    """What moved towards the prompt's end is looked at more, what moved away from it less: by the
    root of how much nearer it is, in dialogues and documents alike."""
    for run in runs:
        values = known[run.donor]
        if values is not None and not run.exact:
            length = min(run.length, len(values) - run.donor_start)
            away = len(attention) - np.arange(run.start, run.start + length)
            was = len(values) - np.arange(run.donor_start, run.donor_start + length)
            attention[run.start : run.start + length] *= np.sqrt(was / away)


def _carry_what_was_read(
    into: np.ndarray, runs: Iterable[KeptRun], drifts: Mapping[str, np.ndarray | None]
) -> None:
    """What a donor computed behind approximate KV has read that: where something exact takes the
    place of what it read, as much of it stays in what is continued as was worst there."""
    for run in runs:
        drift = drifts[run.donor]
        if run.continued and drift is not None and run.start:
            read = drift[: run.start].max(initial=0)
            into[run.start : run.end] = np.maximum(into[run.start : run.end], read)


def _unedited(
    target: np.ndarray, runs: Sequence[KeptRun], keys: Mapping[str, np.ndarray]
) -> np.ndarray:
    same = np.zeros(len(target), dtype=bool)
    for before, run in itertools.pairwise(runs):
        if (before.donor, before.shift) == (run.donor, run.shift):
            gap = slice(before.end, run.start)
            there = keys[run.donor][before.end - run.shift : run.donor_start]
            same[gap] = np.array_equal(target[gap], there)
    return same


def _prefix_runs(
    target: np.ndarray,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: np.ndarray | None,
    pictures: np.ndarray | None,
) -> tuple[tuple[KeptRun, ...], bool]:
    """The exact prefix, and the approximate one that continues it token for token.

    A request that repeats or extends an approximate one sees the very context that its KV was
    computed in, so nothing is compounded: it gets the answer that one got. That is as far from full
    recompute as the other was, so it is continued only as far as this one tolerates it. Less than
    `min_run` positions are not worth it that all behind them are approximate too.

    Returns:
        The runs, and whether a donor could have been continued further by a more tolerant request.
    """
    limit = len(target) - 1
    exact: KeptRun | None = None
    longest: KeptRun | None = None
    could = 0
    for donor in donors:
        shared = min(common_prefix(donor.keys, target), donor.readable, limit)
        if shared and one_turn(positions, 0, donor.positions, 0, shared) != 0:
            continue
        sure = min(shared, donor.exact_len)
        if sure > (exact.length if exact else 0):
            exact = KeptRun(donor.donor_id, 0, 0, sure, exact=True)
        if options.exact_only:
            continue
        could = max(could, shared)
        reach = _reach_within(donor, shared, len(target), options.tolerance, pictures)
        if reach > (longest.length if longest else 0):
            longest = KeptRun(donor.donor_id, 0, 0, reach, exact=False)
    sure = exact.length if exact else 0
    runs = [exact] if exact else []
    end = sure
    if longest and longest.length - sure >= options.min_run:
        end = longest.length
        runs.append(KeptRun(longest.donor, sure, sure, end - sure, exact=False, continued=True))
    return tuple(runs), could - end >= options.min_run


def _reach_within(
    donor: Donor, shared: int, n: int, tolerance: Tolerance, pictures: np.ndarray | None
) -> int:
    """How much of a donor's first `shared` positions a target of `n` tokens may continue."""
    if donor.drift is None:
        return shared
    drift = donor.drift[:shared]
    looked = np.full(len(drift), 1 / n, np.float32)
    if donor.attention is not None:
        looked[: len(donor.attention)] = donor.attention[: len(drift)]
    danger = looked_at(drift, looked)
    if tolerance.pictures and pictures is not None:
        harmless(danger, pictures[: len(danger)])
    # Drift is kept in 16 bits: what is just tolerated where it was made is so where it is read.
    limit = tolerance.risk * (1 + float(np.finfo(np.float16).eps))
    beyond = np.flatnonzero(~(np.sqrt(np.cumsum(np.square(danger))) <= limit))
    return int(beyond[0]) if len(beyond) else shared


def _approximate_runs(
    target: np.ndarray,
    prefix: int,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: np.ndarray | None,
) -> list[KeptRun]:
    return [
        KeptRun(donors[i].donor_id, donor_start, start, length, exact=False)
        for i, donor_start, start, length in cover(target, prefix, donors, options, positions)
    ]
