"""Figures of result files: which there are, and how high they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvshare_mm.apps.bench.figures import frontier, hitrate, layers, quality, reliability
from kvshare_mm.apps.bench.figures.theme import THEMES, Draw, svg

__all__ = ["Drawn", "figure_of", "quality_figure"]

_ROW_INCHES = 2.6


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure for light and for dark pages.

    Attributes:
        name: of its files, without theme and ending.
        light, dark: SVG.
    """

    name: str
    light: str
    dark: str


def figure_of(name: str, report: dict[str, Any]) -> Drawn | None:
    """The figure of one result file, or None if its kind has none of its own."""
    kind = report["kind"]
    if kind == "frontier":
        return _drawn(name, partial(frontier.draw, report), 4.4)
    if kind == "hitrate":
        return _drawn(name, partial(hitrate.draw, report), 3.4)
    if kind == "reliability":
        return _drawn(name, partial(reliability.draw, report), 4.4)
    if kind == "reuse" and any(m.get("kv_deviation") for m in report["methods"].values()):
        return _drawn(name, partial(layers.draw, report), 3.4)
    return None


def quality_figure(name: str, reports: Sequence[dict[str, Any]]) -> Drawn:
    """One figure of all tasks of a model."""
    height = _ROW_INCHES * quality.rows(reports) + 0.2
    return _drawn(name, partial(quality.draw, reports), height)


def _drawn(name: str, draw: Draw, height: float) -> Drawn:
    return Drawn(name, *(svg(draw, theme, height, name) for theme in THEMES))
