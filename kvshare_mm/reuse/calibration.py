"""What audits teach of the bound on divergence: how far off it is for a model and its traffic.

`divergence.divergence_bound` says what 95% of requests stay below, by constants that were fitted to
one small model. An audit measures what became of a request, and its *score* is the logarithm of
what was observed over what that bound said. The *factor* by which the bound has to be lifted, so
that it holds for 95% of the requests to come, is learned from scores in two steps:

- A forecast from the family's own scores and those of others (see `forecast`). Without any, the
  constants hold as they are.
- Adaptive conformal inference (arXiv 2106.00170, as online quantile tracking, arXiv 2307.16895)
  corrects the forecast: each audited request that was beyond what it was expected to stay below
  moves the factor up, each that kept to it moves it down by as much less as keeps the two in
  balance at 5%. Whatever the model and however its traffic shifts, the share beyond goes there.
  What is expected of a request is at most what it asked for, and often less: requests that could
  not miss must not make up for those that do.

A family that is far off, or misses again and again, is not reused approximately any more, but for
one request now and then that is audited for certain: without those it could never come back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel

from kvshare_mm.errors import ConfigError
from kvshare_mm.reuse.forecast import Forecast

logger = logging.getLogger(__name__)

MISS_SHARE = 0.05
# Behind the name of a file that is being written; that was found unreadable.
TEMP_SUFFIX, ASIDE_SUFFIX = ".tmp", ".unreadable"

# Divergence below this is rounding; scores beyond that say no more.
ROUNDING, _MOST_SCORE = 1e-6, 8.0
# How far an audit moves the factor's logarithm, at most in all.
_STEP, _MOST_OFFSET = 0.4, 6.0
# The factor is never below the one; a family that needs the other is given up.
_LEAST_FACTOR, _FAR = 1 / 300, 30.0
# Fewest audits of a family that is given up; those that are remembered, families of a namespace,
# namespaces.
_LEAST = 3
_RECENT, _FAMILIES, _NAMESPACES = 48, 256, 256
# Of a family that is given up one request in so many is tried, fewer each time that it fails; it is
# back after so many good ones in a row.
_TRIAL_EVERY, _TRIAL_RARELY, _GOOD_TRIALS = 32, 512, 3


class _Family(BaseModel):
    """Audits of a family, the newest last."""

    scores: list[float] = []
    missed: list[bool] = []
    audits: int = 0
    misses: int = 0
    shut: bool = False
    trial_every: int = _TRIAL_EVERY
    since_trial: int = 0
    good_trials: int = 0

    def add(self, score: float, missed: bool) -> None:
        self.scores = [*self.scores, score][-_RECENT:]
        self.missed = [*self.missed, missed][-_RECENT:]
        self.audits += 1
        self.misses += missed


class _Namespace(BaseModel):
    """Families, those audited last at the end, and by how much the forecast is corrected."""

    families: dict[str, _Family] = {}
    offset: float = 0.0


# Raise it with the constants of the bound too: scores are relative to that.
_VERSION = 3


class _State(BaseModel):
    """Its file."""

    version: int
    namespaces: dict[str, _Namespace] = {}
    xxh3_128: str | None = None

    @property
    def checksum(self) -> str:
        text = json.dumps({n: s.model_dump() for n, s in self.namespaces.items()}, sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())


def read_state(path: Path) -> dict[str, _Namespace]:
    """What a file says was learned, by namespace.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, of another version, or no such file at all.
    """
    state = _State.model_validate_json(path.read_bytes())
    if state.version != _VERSION:
        raise ValueError(f"it is of version {state.version}, this is {_VERSION}")
    if state.xxh3_128 != state.checksum:
        raise ValueError("its checksum does not match")
    return state.namespaces


@dataclass(frozen=True, slots=True)
class Verdict:
    """What experience says of a request's family.

    Attributes:
        factor: by which the bound has to be lifted to hold.
        shut: it is not to be reused approximately.
        trial: it would not be, but this one is tried and must be audited.
    """

    factor: float
    shut: bool = False
    trial: bool = False


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """A family as operators see it.

    Attributes:
        misses: audits that were beyond what was asked for, or said a changed fact otherwise.
        factor: what the bound is lifted by for it now.
        shut: it is not reused approximately any more.
    """

    namespace: str
    family: str
    audits: int
    misses: int
    factor: float
    shut: bool


class Calibration:
    """Learns from audits, by namespace and family. Thread-safe.

    Args:
        counters: events by name are counted here.
        path: where its state is kept; None: in RAM only. One that is unreadable, or of another
            version, is ignored and counted.
        audits: whether there will be audits: only then are families that were given up tried.
    """

    def __init__(
        self, counters: Counter[str], path: Path | None = None, audits: bool = True
    ) -> None:
        self._counters = counters
        self._path = path
        self._audits = audits
        self._lock = threading.Lock()
        self._spaces: dict[str, _Namespace] = {}
        self._start = _Namespace()  # what a namespace begins with
        self._forecasts: dict[str, Forecast] = {}
        if path is not None:
            self._restore(path)

    # -- asking -----------------------------------------------------------------------------

    def verdict(self, ns: str, family: str | None = None, look_only: bool = False) -> Verdict:
        """What to do with a request. Without a family: the factor before one is known.

        Args:
            look_only: there is no request: it is not counted, and is no trial.
        """
        with self._lock:
            space = self._spaces.get(ns, self._start)
            known = space.families.get(family or "")
            log_factor = self._log_factor(ns, space, known)
            if known is None or not known.shut:
                return Verdict(math.exp(log_factor))
            known.since_trial += not look_only
            trial = not look_only and self._audits and known.since_trial >= known.trial_every
            if trial:
                known.since_trial = 0
            return Verdict(min(_FAR, math.exp(log_factor)), shut=not trial, trial=trial)

    def audits(self, ns: str) -> int:
        """Those that a namespace has learned from."""
        with self._lock:
            return sum(f.audits for f in self._spaces.get(ns, self._start).families.values())

    def report(self) -> list[FamilyReport]:
        """All families that were audited."""
        with self._lock:
            return [
                FamilyReport(
                    ns, name, f.audits, f.misses, math.exp(self._log_factor(ns, space, f)), f.shut
                )
                for ns, space in self._spaces.items()
                for name, f in space.families.items()
            ]

    # -- learning ---------------------------------------------------------------------------

    def observe(
        self,
        ns: str,
        family: str,
        *,
        observed: float,
        bound: float,
        asked: float,
        expected: float | None = None,
        fact: bool = False,
        trial: bool = False,
    ) -> bool:
        """Take up an audit; whether the request missed what it asked for.

        Args:
            observed: its divergence, nats.
            bound: what the constants said.
            asked: what it asked for.
            expected: what it was expected to stay below; None: what it asked for.
            fact: a changed fact appears otherwise in the answer: a miss, whatever was observed.
            trial: the request was a trial of its family.
        """
        missed = fact or observed > asked
        worth = max(observed, 2 * asked) if fact else observed
        score = math.log(max(worth, ROUNDING) / max(bound, ROUNDING))
        with self._lock:
            space = self._spaces.pop(ns, None) or self._start.model_copy(deep=True)
            self._spaces[ns] = space  # the last one is the one used last
            known = space.families.pop(family, None) or _Family()
            space.families[family] = known
            self._forecasts.pop(ns, None)
            known.add(max(-_MOST_SCORE, min(_MOST_SCORE, score)), missed)
            beyond = fact or observed > max(asked if expected is None else expected, ROUNDING)
            moved = space.offset + _STEP * (beyond - MISS_SHARE)
            space.offset = max(-_MOST_OFFSET, min(_MOST_OFFSET, moved))
            if known.shut and trial:
                self._tried(known, missed)
            elif known.shut:
                pass  # it was served before its family was given up
            elif _too_many(known.missed) or (
                len(known.scores) >= _LEAST and self._log_factor(ns, space, known) > math.log(_FAR)
            ):
                known.shut, known.trial_every, known.good_trials = True, _TRIAL_EVERY, 0
                self._counters["family_shut"] += 1
            _keep_last(space.families, _FAMILIES)
            _keep_last(self._spaces, _NAMESPACES)
            self._forecasts = {n: f for n, f in self._forecasts.items() if n in self._spaces}
        return missed

    def _log_factor(self, ns: str, space: _Namespace, known: _Family | None) -> float:
        """Lock held."""
        ns = ns if ns in self._spaces else ""  # those that nobody audited share one
        if ns not in self._forecasts:
            self._forecasts[ns] = Forecast.of(
                family.scores for family in space.families.values() if family.scores
            )
        found = self._forecasts[ns].quantile(known.scores if known else []) + space.offset
        return max(math.log(_LEAST_FACTOR), found)

    def _tried(self, known: _Family, missed: bool) -> None:
        known.good_trials = 0 if missed else known.good_trials + 1
        if missed:
            known.trial_every = min(_TRIAL_RARELY, 2 * known.trial_every)
        elif known.good_trials >= _GOOD_TRIALS:
            known.shut = False
            known.missed = known.missed[-_GOOD_TRIALS:]
            known.scores = known.scores[-_GOOD_TRIALS:]
            self._counters["family_opened"] += 1

    # -- its file ---------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        return not (self._spaces or self._start.families)

    def start_from(self, path: Path, fingerprint: str) -> None:
        """What every namespace of a model begins with, as it was learned elsewhere.

        Raises:
            ConfigError: the file cannot be read, or is of another model.
        """
        try:
            spaces = read_state(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"calibration: {path} cannot be used: {error}") from error
        known = [s for ns, s in spaces.items() if ns.startswith(f"{fingerprint}-")]
        if not known:
            raise ConfigError(f"calibration: {path} was made with another model")
        families = {name: f for space in known for name, f in space.families.items()}
        offset = sum(space.offset for space in known) / len(known)
        self._start = _Namespace(families=families, offset=offset)

    def _restore(self, path: Path) -> None:
        try:
            self._spaces = read_state(path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._counters["calibration_unreadable"] += 1
            logger.warning("the calibration in %s is not used: %s", path, error)
            if isinstance(error, ValueError):
                with suppress(OSError):  # what comes next shall not be written over it
                    path.replace(path.with_name(path.name + ASIDE_SUFFIX))

    def save(self, path: Path | None = None) -> None:
        """Write its state, whole or not at all. Raises OSError: to a path that was given."""
        into = path or self._path
        if into is None:
            return
        with self._lock:
            state = _State(version=_VERSION, namespaces=self._spaces)
            state.xxh3_128 = state.checksum
            text = state.model_dump_json()
        temporary = into.with_name(f"{into.name}.{os.getpid()}{TEMP_SUFFIX}")
        try:
            into.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(into)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if path is not None:
                raise
            self._counters["calibration_not_written"] += 1
            logger.warning("the calibration could not be kept in %s: %s", into, error)


def _too_many(missed: list[bool]) -> bool:
    """Whether so many misses are less likely than 1 in 200 if one in ten requests misses."""
    n, count = len(missed), sum(missed)
    chance = sum(math.comb(n, k) * 0.1**k * 0.9 ** (n - k) for k in range(count, n + 1))
    return chance < 1 / 200


def _keep_last(mapping: dict[str, Any], count: int) -> None:
    for name in list(mapping)[: max(0, len(mapping) - count)]:
        del mapping[name]
