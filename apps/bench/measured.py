"""Measure one thing after the other: what is known is not measured again, what cannot is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.progress import track

from kvshare_mm.apps.bench.journal import Journal, settings_key
from kvshare_mm.errors import ConfigError, InvalidRequestError

T = TypeVar("T")


def measured(
    things: Sequence[T],
    measure: Callable[[T], dict[str, Any]],
    *,
    keys: Iterable[Any],
    names: Iterable[str],
    noun: str,
    title: str,
    journal: Journal,
    progress: bool,
) -> tuple[list[tuple[T, dict[str, Any]]], list[dict[str, str]]]:
    """Every thing with its row, and those that no row could be made for.

    Args:
        measure: the row of a thing, JSON-ready; InvalidRequestError leaves the thing out.
        keys: JSON-ready data that tell each thing from the others in `journal`.
        names: what each is called among those left out.
        noun: what one thing is called in an error.
        title: of the progress bar.

    Raises:
        ConfigError: nothing could be measured.
    """
    rows: list[tuple[T, dict[str, Any]]] = []
    skipped: list[dict[str, str]] = []
    shown = track(things, title, disable=not progress, transient=True)
    for thing, data, name in zip(shown, keys, names, strict=True):
        key = settings_key(data)
        row = journal.get(key)
        if row is None:
            try:
                row = measure(thing)
            except InvalidRequestError as error:
                row = {"skipped": str(error)}
            journal.put(key, row)
        if "skipped" in row:
            skipped.append({"id": name, "reason": row["skipped"]})
        else:
            rows.append((thing, row))
    if not rows:
        raise ConfigError(f"no {noun} could be served; the first: {skipped[0]['reason']}")
    return rows, skipped
