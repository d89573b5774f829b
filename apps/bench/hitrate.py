"""`kvshare bench hitrate`: how much of a stream of prompts need not be computed again.

The paper's Figure 4 (arXiv 2503.16525): the distribution over prompts of the share of tokens that
need no recomputation, for prefix caching and KVShare, and how it grows with the pool of donors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.gptcache import counts_as_hit
from kvshare_mm.apps.bench.pools import OpenPool
from kvshare_mm.apps.bench.prompts import prompt
from kvshare_mm.apps.bench.similar import nearest_before
from kvshare_mm.errors import ConfigError
from kvshare_mm.models.loader import load_tokenizer
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import SegmentStream

Span = tuple[int, int]


def run(
    streams: Sequence[SegmentStream],
    user_spans: Sequence[Span],
    open_pools: dict[str, OpenPool],
    pool_sizes: Sequence[int],
    num_measured: int,
    embeddings: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Send a stream through pools of several sizes and measure its last prompts.

    The same prompts are measured at every size, each against the prompts right before it. The
    template around a user's words is in every prompt and would count as a hit: shares are of the
    user's own tokens.

    Args:
        streams: prompts in order.
        user_spans: ``[start, end)`` of the user's tokens in each.
        open_pools: by method, opens a pool of a size.
        pool_sizes: most donors in the pool.
        num_measured: the last so many prompts are measured.
        embeddings: ``[len(streams), dim]`` unit rows, for GPTCache's hit rate; None leaves it out.

    Returns:
        The report as JSON-ready data: ``pool_sizes`` by size, with the mean share (of tokens, and
        over prompts), every prompt's share, and milliseconds of lookup and planning by method.

    Raises:
        ConfigError: there are too few prompts to measure.
    """
    n = len(streams)
    if not 0 < num_measured < n:
        raise ConfigError(f"cannot measure {num_measured} of {n} prompts: some must come before")
    first = n - num_measured
    sizes: dict[str, Any] = {}
    with Progress(transient=True) as bar:
        for size in pool_sizes:
            begin = max(0, first - size)
            pools = {name: open_pool(size) for name, open_pool in open_pools.items()}
            found: dict[str, list[float]] = {name: [] for name in pools}
            kept: dict[str, int] = dict.fromkeys(pools, 0)
            seconds: dict[str, list[float]] = {name: [] for name in pools}
            held = []
            task = bar.add_task(f"pool of {size}", total=n - begin)
            try:
                for i in range(begin, n):
                    span = user_spans[i]
                    held.append(max(len(pool) for pool in pools.values()))
                    for name, pool in pools.items():
                        plan, spent = pool.admit(streams[i])
                        if i >= first:
                            saved = _saved(plan, span)
                            kept[name] += saved
                            found[name].append(saved / (span[1] - span[0]))
                            seconds[name].append(spent)
                    bar.advance(task)
            finally:
                for pool in pools.values():
                    pool.close()
            tokens = sum(end - start for start, end in user_spans[first:])
            sizes[str(size)] = {
                "donors": float(np.mean(held[-num_measured:])),
                "methods": {
                    name: {
                        "token_share": kept[name] / tokens,
                        "prompt_share": float(np.mean(found[name])),
                        "shares": [round(share, 3) for share in found[name]],
                        "planner_ms": spread([1000 * s for s in seconds[name]], 50, 99),
                    }
                    for name in pools
                },
                "gptcache_hit_rate": _gptcache(embeddings, first, size),
            }
    return {"kind": "hitrate", "prompts": n, "measured": num_measured, "pool_sizes": sizes}


def encoded(texts: Sequence[str], model: str, raw: bool) -> tuple[list[SegmentStream], list[Span]]:
    """Prompts as a model is asked them, and the user's tokens in each."""
    tokenizer = load_tokenizer(model)
    streams = [prompt(text, tokenizer, not raw) for text in texts]
    head, tail = 0, 0
    if not raw:
        head, tail = template_length(*(prompt(text, tokenizer) for text in ("Why?", "5")))
    return streams, [user_span(stream, head, tail) for stream in streams]


def user_span(stream: SegmentStream, head: int, tail: int) -> Span:
    """The user's tokens of a prompt between a template's `head` and `tail` tokens."""
    end = max(len(stream) - tail, head + 1)
    return head, min(end, len(stream))


def template_length(one: SegmentStream, other: SegmentStream) -> tuple[int, int]:
    """Tokens that two prompts with nothing else in common share at their beginning and end."""
    return _common(one.align_keys, other.align_keys), _common(
        one.align_keys[::-1], other.align_keys[::-1]
    )


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def _saved(plan: ReusePlan, span: Span) -> int:
    """Positions of `span` that the model does not run on."""
    computed = plan.compute
    return span[1] - span[0] - int(((computed >= span[0]) & (computed < span[1])).sum())


def _gptcache(embeddings: NDArray[np.float32] | None, first: int, size: int) -> float | None:
    if embeddings is None:
        return None
    nearest = [nearest_before(embeddings, i, size) for i in range(first, len(embeddings))]
    return float(counts_as_hit(np.array(nearest)).mean())
