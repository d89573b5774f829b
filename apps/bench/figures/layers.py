"""How far reused KV is from full recompute, layer by layer."""

from __future__ import annotations

from typing import Any

from kvshare_mm.apps.bench.figures.theme import Theme, style


def draw(report: dict[str, Any], figure: Any, theme: Theme) -> None:
    """The report of `kvshare bench reuse --layers`."""
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
