"""What eviction costs: ``python -m tests.store.evicted``, two minutes; no model is run.

Templates of which the k-th is asked for 1/k^0.8 as often, with other tokens each time, pass
through stores that hold a few of them. Lost is what living nodes borrowed of evicted ones: what it
would be worth to hand such rows over instead of dropping them.
"""

from __future__ import annotations

import numpy as np
import torch

from kvshare_mm import KVShareConfig
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.repair import make_policy
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import SegmentStream, text_stream

_TEMPLATES, _TOKENS, _CHANGED, _REQUESTS = 150, 700, 20, 2000
_ROW = 1024  # bytes of K, and of V


def requests(seed: int = 0) -> list[SegmentStream]:
    draw = np.random.default_rng(seed)
    templates = draw.integers(0, 30_000, (_TEMPLATES, _TOKENS))
    popular = np.arange(1, _TEMPLATES + 1) ** -0.8
    asked = templates[draw.choice(_TEMPLATES, _REQUESTS, p=popular / popular.sum())]
    for request in asked:
        request[draw.choice(_TOKENS, _CHANGED, replace=False)] = draw.integers(0, 30_000, _CHANGED)
    return [text_stream(request) for request in asked]


def passed(streams: list[SegmentStream], tokens: int) -> tuple[float, float]:
    """Of the second half of the prompts, the share that was reused; of what was evicted, the share
    that was borrowed."""
    config, policy = KVShareConfig.of(), make_policy("none")
    pool = DonorPool("evicted", KVEditor(None), HostTier(tokens * 2 * _ROW))
    kv = torch.zeros((1, 1, 1, _ROW), dtype=torch.uint8)
    evicted = lost = reused = 0
    forget = pool.forget

    def told(node_id: str) -> None:
        nonlocal evicted, lost
        evicted += pool.tree[node_id].num_owned
        forget(node_id)
        borrowed = np.zeros(_TOKENS, dtype=bool)
        for node in pool.tree:
            for piece in node.pieces:
                if piece.owner == node_id:
                    borrowed[piece.owner_start : piece.owner_start + piece.length] = True
        lost += int(borrowed.sum())

    pool.store._on_gone = told
    for number, stream in enumerate(streams):
        plan = pool.reuse.find(stream, "evicted", config.planner, policy).plan
        for owner in {piece.owner for piece in pool.reuse.catalogue.pieces(plan)}:
            pool.store.touch(owner)  # as reading its KV does
        if number >= len(streams) // 2:
            reused += len(stream) - len(plan.compute)
        rows = kv.expand(1, 1, len(stream), _ROW)
        pool.save(stream.align_keys, "evicted", plan, rows, rows, "")
    pool.close()
    return reused / sum(map(len, streams[len(streams) // 2 :])), lost / max(evicted, 1)


def main() -> None:
    streams = requests()
    for tokens in (20_000, 40_000, 60_000, 100_000):
        reused, lost = passed(streams, tokens)
        print(f"room for {tokens:7,} tokens: {reused:6.1%} reused, {lost:5.1%} lost", flush=True)


if __name__ == "__main__":
    main()
