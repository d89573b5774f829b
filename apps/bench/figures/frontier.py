"""Divergence against the share of the work that is done: lower and further left is better."""

from __future__ import annotations

from typing import Any

from kvshare_mm.apps.bench.figures.theme import Theme, label, model_label, style

# Below this a divergence is rounding, and a logarithmic axis has no zero.
_FLOOR = 1e-5


def draw(report: dict[str, Any], figure: Any, theme: Theme) -> None:
    """The report of `kvshare bench frontier` on one picture."""
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
    axes.set_title(
        f"{report['pairs']} pairs of similar prompts, {model_label(report['model'])}", loc="left"
    )
    axes.legend()
