"""How a kind of result is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[list[str]]
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of result is told.

    Attributes:
        title: heading of a result.
        rows: its table, headings first.
    """

    title: Callable[[Report], str]
    rows: Callable[[Report], Rows]


def ms(seconds: float) -> str:
    """Seconds as milliseconds, for a table."""
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def mib(size: float) -> str:
    """Bytes as MiB, for a table."""
    return f"{size / 2**20:.0f} MiB"
