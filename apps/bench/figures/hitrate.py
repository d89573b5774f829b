"""What need not be computed again: by prompt at the largest pool, and against the pool's size."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvshare_mm.apps.bench.figures.theme import Theme, style


def draw(report: dict[str, Any], figure: Any, theme: Theme) -> None:
    """The report of `kvshare bench hitrate`: distribution on the left, growth on the right."""
    left, right = figure.subplots(1, 2)
    sizes = report["pool_sizes"]
    largest = list(sizes.values())[-1]
    for name, found in largest["methods"].items():
        shares = 100 * np.sort(found["shares"])[::-1]
        prompts = 100 * np.arange(1, len(shares) + 1) / len(shares)
        left.step(shares, prompts, **{**style(name, theme), "marker": ""})
        right.plot(
            [float(size) for size in sizes],
            [100 * s["methods"][name]["token_share"] for s in sizes.values()],
            **style(name, theme),
        )
    left.set_xlabel("at least % of the prompt's tokens reused")
    left.set_ylabel("% of prompts")
    left.set_xlim(1, 100)
    left.set_ylim(bottom=0)
    # Most prompts of an open stream reuse nothing: what matters is the beginning of the curve.
    left.set_ylim(top=max(5.0, 1.1 * _most(largest)))
    left.set_title(f"{report['stream']}, pool of {list(sizes)[-1]}", loc="left")
    left.legend()
    right.set_xscale("log")
    right.set_xticks([float(size) for size in sizes], labels=list(sizes))
    right.minorticks_off()
    right.set_ylim(bottom=0)
    right.set_xlabel("donors in the pool")
    right.set_ylabel("% of tokens reused")
    hits = largest["gptcache_hit_rate"]
    right.set_title(
        "" if hits is None else f"GPTCache answers {hits:.0%} from its store", loc="left"
    )


def _most(size: dict[str, Any]) -> float:
    """The largest percentage of prompts that reuse at least 1%."""
    return max(
        100 * float((np.array(m["shares"]) >= 0.01).mean()) for m in size["methods"].values()
    )
