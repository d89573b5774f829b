"""Scores of answers with their intervals, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvshare_mm.apps.bench.figures.theme import Theme, label

_COLUMNS = 2


def rows(reports: Sequence[dict[str, Any]]) -> int:
    """Rows of panels."""
    return -(-len(reports) // _COLUMNS)


def draw(reports: Sequence[dict[str, Any]], figure: Any, theme: Theme) -> None:
    """Reports of `kvshare bench quality` of one model."""
    columns = min(_COLUMNS, len(reports))
    grid = figure.subplots(rows(reports), columns, squeeze=False)
    for axes in grid.flat[len(reports) :]:
        axes.set_axis_off()
    for axes, report in zip(grid.flat, reports, strict=False):
        names = list(report["methods"])[::-1]
        scores = [report["methods"][name]["score"] for name in names]
        middle = [s["estimate"] for s in scores]
        error = [
            [max(0.0, s["estimate"] - s["low"]) for s in scores],
            [max(0.0, s["high"] - s["estimate"]) for s in scores],
        ]
        axes.barh(
            [label(name) for name in names],
            middle,
            xerr=error,
            color=[theme.colour(name) for name in names],
            error_kw={"ecolor": theme.text, "elinewidth": 1.2, "capsize": 3},
            height=0.66,
        )
        axes.axvline(
            report["methods"]["full"]["score"]["estimate"], color=theme.text, linestyle=":"
        )
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{report['metric']} (95% interval)")
        axes.set_title(f"{report['task']}, {report['items']} items", loc="left")
