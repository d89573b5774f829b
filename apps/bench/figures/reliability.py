"""Does a predicted divergence come true? Points, means of bins, and the diagonal."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvshare_mm.apps.bench.figures.theme import Theme, model_label

_FLOOR = 1e-6
_BINS = 8


def draw(report: dict[str, Any], figure: Any, theme: Theme) -> None:
    """A predictor's report: ``predicted`` and ``observed``, of equal length, in nats."""
    axes = figure.subplots()
    predicted = np.maximum(np.array(report["predicted"], dtype=float), _FLOOR)
    observed = np.maximum(np.array(report["observed"], dtype=float), _FLOOR)
    accent, faint = theme.colour("kvshare"), theme.colour("prefix")
    axes.scatter(predicted, observed, s=14, color=faint, alpha=0.55, label="one request")
    order = np.argsort(predicted)
    bins = [b for b in np.array_split(order, min(_BINS, len(order))) if len(b)]
    axes.plot(
        [predicted[b].mean() for b in bins],
        [observed[b].mean() for b in bins],
        color=accent,
        marker="o",
        linewidth=2,
        label="mean of a bin",
    )
    low, high = min(predicted.min(), observed.min()), max(predicted.max(), observed.max())
    axes.plot([low, high], [low, high], color=theme.text, linestyle=":", label="as predicted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted KL of the first token (nats)")
    axes.set_ylabel("observed")
    model = model_label(report.get("model", ""))
    axes.set_title(f"{len(predicted)} requests, {model}".rstrip(", "), loc="left")
    axes.legend()
