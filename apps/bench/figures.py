"""Figures of result files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kvshare_mm.apps.bench.theme import THEMES, Draw, Theme, label, model_label, style, svg

Report = dict[str, Any]

# Below this a divergence is rounding, and a logarithmic axis has no zero.
_FLOOR = 1e-5
_BINS = 8
_ROW_INCHES = 2.6
_COLUMNS = 2


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


def figure_of(name: str, report: Report) -> Drawn | None:
    """The figure of one result file, or None if its kind has none of its own."""
    kind = report["kind"]
    if kind == "reuse" and not any(m.get("kv_deviation") for m in report["methods"].values()):
        return None
    if kind not in _DRAWN:
        return None
    draw, height = _DRAWN[kind]
    return _drawn(name, partial(draw, report), height)


def quality_figure(name: str, reports: Sequence[Report]) -> Drawn:
    """One figure of all tasks of a model."""
    rows = -(-len(reports) // _COLUMNS)
    return _drawn(name, partial(_quality, reports, rows), _ROW_INCHES * rows + 0.2)


def _drawn(name: str, draw: Draw, height: float) -> Drawn:
    return Drawn(name, *(svg(draw, theme, height, name) for theme in THEMES))


def _frontier(report: Report, figure: Any, theme: Theme) -> None:
    """Divergence against the share of the work that is done: lower and further left is better."""
    axes = figure.subplots()
    for name, points in report["methods"].items():
        x = [100 * p["work_share"] for p in points]
        y = [max(p["kl_first_token"]["mean"], _FLOOR) for p in points]
        if max(y) <= _FLOOR:
            # Exact: any divergence is zero, so its cost is a line.
            axes.axvline(x[0], color=theme.colour(name), linestyle="--", linewidth=1.5,
                         label=f"{label(name)} (exact)")  # fmt: skip
            continue
        axes.plot(x, y, **style(name, theme))
    axes.set_yscale("log")
    axes.set_xlabel("work, % of full recompute (probes of a policy included)")
    axes.set_ylabel("KL of the first token, mean (nats)")
    what = f"{report['pairs']} pairs of {report.get('what', 'similar prompts')}"
    axes.set_title(f"{what}, {model_label(report['model'])}", loc="left")
    figure.legend(loc="outside lower center", ncols=4)


def _models(report: Report, figure: Any, theme: Theme) -> None:
    """The frontiers of several models, beside those of windows."""
    methods = ("kvshare", "epic")
    panels = dict(zip(methods, figure.subplots(1, 2, sharey=True, sharex=True), strict=True))
    lines = ("kvshare", "cacheblend", "boundary", "placeholders", "epic")
    for name, axes in panels.items():
        for each, line in zip(report["reports"], itertools.cycle(lines)):
            found = each["methods"].get(name, [])
            x = [100 * p["work_share"] for p in found]
            y = [max(p["kl_first_token"]["mean"], _FLOOR) for p in found]
            told = {"color": theme.colour(line), "label": model_label(each["model"])}
            axes.plot(x, y, marker="o", markersize=4, linewidth=1.8, **told)
        axes.set_yscale("log")
        axes.set_xlabel("work, % of full recompute")
        axes.set_title(label(name), loc="left")
    panels["kvshare"].set_ylabel("KL of the first token, mean (nats)")
    handles, labels = panels["kvshare"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _layers(report: Report, figure: Any, theme: Theme) -> None:
    """How far reused KV is from full recompute, layer by layer."""
    panels = dict(zip(("key", "value"), figure.subplots(1, 2, sharey=True), strict=True))
    for part, axes in panels.items():
        for name, method in report["methods"].items():
            if method.get("kv_deviation"):
                line = {**style(name, theme), "marker": ""}
                axes.plot([100 * x for x in method["kv_deviation"][part]], **line)
        axes.set_xlabel("layer")
        axes.set_title(f"{part}s of reused positions", loc="left")
    panels["key"].set_ylabel("deviation, % of the norm")
    panels["key"].legend()


def _reliability(report: Report, figure: Any, theme: Theme) -> None:
    """Does a predicted divergence come true? Points, means of bins, and the diagonal."""
    axes = figure.subplots()
    predicted, observed = (
        np.maximum(np.array(report[part], dtype=float), _FLOOR / 10)
        for part in ("predicted", "observed")
    )
    accent, faint = theme.colour("kvshare"), theme.colour("prefix")
    axes.scatter(predicted, observed, s=14, color=faint, alpha=0.55, label="one request")
    order = np.argsort(predicted)
    bins = [b for b in np.array_split(order, min(_BINS, len(order))) if len(b)]
    means = ([values[b].mean() for b in bins] for values in (predicted, observed))
    axes.plot(*means, color=accent, marker="o", linewidth=2, label="mean of a bin")
    low, high = min(predicted.min(), observed.min()), max(predicted.max(), observed.max())
    axes.plot([low, high], [low, high], color=theme.text, linestyle=":", label="as predicted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted KL of the first token (nats)")
    axes.set_ylabel("observed")
    axes.set_title(f"{len(predicted)} requests, {model_label(report['model'])}", loc="left")
    axes.legend()


def _hitrate(report: Report, figure: Any, theme: Theme) -> None:
    """What need not be computed again: by prompt at the largest pool, and against its size."""
    left, right = figure.subplots(1, 2)
    sizes = report["pool_sizes"]
    numbers = [float(size) for size in sizes]
    name_of_largest, largest = list(sizes.items())[-1]
    for name, found in largest["methods"].items():
        shares = 100 * np.sort(found["shares"])[::-1]
        prompts = 100 * np.arange(1, len(shares) + 1) / len(shares)
        left.step(shares, prompts, **{**style(name, theme), "marker": ""})
        growth = [100 * s["methods"][name]["token_share"] for s in sizes.values()]
        right.plot(numbers, growth, **style(name, theme))
    left.set_xlabel("at least % of the prompt's tokens reused")
    left.set_ylabel("% of prompts")
    left.set_xlim(1, 100)
    # Most prompts of an open stream reuse nothing: what matters is the beginning of the curve.
    most = max(float(np.mean(np.array(m["shares"]) >= 0.01)) for m in largest["methods"].values())
    left.set_ylim(0, max(5.0, 110 * most))
    left.set_title(f"{report['stream']}, pool of {name_of_largest}", loc="left")
    left.legend()
    right.set_xscale("log")
    right.set_xticks(numbers, labels=list(sizes))
    right.minorticks_off()
    right.set_ylim(bottom=0)
    right.set_xlabel("donors in the pool")
    right.set_ylabel("% of tokens reused")
    hits = largest["gptcache_hit_rate"]
    if hits is not None:
        right.set_title(f"GPTCache answers {hits:.0%} from its store", loc="left")


def _quality(reports: Sequence[Report], rows: int, figure: Any, theme: Theme) -> None:
    """Scores of answers with their intervals, a panel for each task."""
    grid = figure.subplots(rows, min(_COLUMNS, len(reports)), squeeze=False)
    for axes in grid.flat[len(reports) :]:
        axes.set_axis_off()
    for axes, report in zip(grid.flat, reports, strict=False):
        names = list(report["methods"])[::-1]
        scores = [report["methods"][name]["score"] for name in names]
        axes.barh(
            [label(name) for name in names],
            [s["estimate"] for s in scores],
            xerr=[
                [max(0.0, s["estimate"] - s["low"]) for s in scores],
                [max(0.0, s["high"] - s["estimate"]) for s in scores],
            ],
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


# By kind of report: what draws it, and inches of height.
_DRAWN: dict[str, tuple[Callable[[Report, Any, Theme], None], float]] = {
    "frontier": (_frontier, 4.4),
    "hitrate": (_hitrate, 3.4),
    "models": (_models, 4.4),
    "reliability": (_reliability, 4.4),
    "reuse": (_layers, 3.4),
}
