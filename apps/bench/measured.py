"""Measure one thing after the other: what is known is not measured again, what cannot is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.progress import track

from kvshare_mm.apps.bench.journal import Journal, settings_key
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.errors import ConfigError, InvalidRequestError
from kvshare_mm.stream import SegmentStream

T = TypeVar("T")
Row = dict[str, Any]
Skipped = list[dict[str, str]]


def measured(
    things: Sequence[T],
    measure: Callable[[T], Row],
    journal: Journal | None,
    *,
    key: Callable[[T], Any],
    name: Callable[[T], str],
    noun: str,
) -> tuple[list[tuple[T, Row]], Skipped]:
    """Every thing with its row, and those that no row could be made for.

    Args:
        measure: the row of a thing, JSON-ready; InvalidRequestError leaves the thing out.
        journal: results that are known already, and where new ones are kept; None: nowhere.
        key: JSON-ready data that tell a thing from the others.
        name: what a thing is called among those left out.
        noun: what one thing is called in an error.

    Raises:
        ConfigError: nothing could be measured.
    """
    journal = journal or Journal(None, None)
    rows: list[tuple[T, Row]] = []
    skipped: Skipped = []
    for index, thing in enumerate(track(things, f"Measuring {noun}s", transient=True)):
        known = settings_key([index, key(thing)])
        row = journal.get(known)
        if row is None:
            try:
                row = measure(thing)
            except InvalidRequestError as error:
                row = {"skipped": str(error)}
            journal.put(known, row)
        if "skipped" in row:
            skipped.append({"id": name(thing), "reason": row["skipped"]})
        else:
            rows.append((thing, row))
    if not rows:
        raise ConfigError(f"no {noun} could be served; the first: {skipped[0]['reason']}")
    return rows, skipped


@dataclass(frozen=True, slots=True)
class Asked:
    """The target of a pair, while its donor alone is stored.

    Attributes:
        target: the prompt.
        ns: its namespace.
        reference: a right answer, or None.
    """

    target: SegmentStream
    ns: str
    reference: str | None


def measured_pairs(
    rig: Rig,
    pairs: Sequence[Row],
    measure: Callable[[Asked], Row],
    journal: Journal | None,
    answer: int = 0,
) -> tuple[list[Row], Skipped]:
    """The rows of all pairs that could be served, and those that could not.

    Args:
        measure: what becomes the row of a pair.
        answer: tokens that must fit behind a prompt.

    Raises:
        ConfigError: no pair could be served.
    """

    def one(pair: Row) -> Row:
        donor, target = encode(rig, pair["donor"]), encode(rig, pair["target"])
        rig.check(donor, target, answer=answer)
        ns = rig.namespace(f"pair-{pair['id']}")
        with rig.known(donor, ns):
            row = measure(Asked(target, ns, pair.get("reference")))
        return {"id": pair["id"], "tokens": len(target), **row}

    found, skipped = measured(
        pairs, one, journal, key=lambda pair: pair, name=lambda pair: pair["id"], noun="pair"
    )
    return [row for _, row in found], skipped
