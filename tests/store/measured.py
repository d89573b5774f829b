"""What fetching a donor costs, and computing it: ``python -m tests.store.measured``, a minute.

1,000 tokens of SmolLM2-135M in float32, by each store that replicas share, on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from kvshare_mm import KVShare, RequestOptions, SamplingParams
from kvshare_mm.node import Node, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.shared import SharedTier

from ..remote_servers import shared_server

_TOKENS = 1000


def timed(name: str, work: Callable[[], object], times: int = 21) -> None:
    """Print what a call takes; the first one is left out."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds[1:], [0.1, 0.5, 0.9]) * 1e3
    print(f"{name:20} median {median:7.1f} ms, 10% {low:7.1f}, 90% {high:7.1f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    keys = np.arange(_TOKENS, dtype=np.uint64)
    kv = NodeKV(torch.randn(30, 3, _TOKENS, 64), torch.randn(30, 3, _TOKENS, 64))
    stored = StoredNode(Node("a", "ns", keys, (Span(0, _TOKENS),)), kv)
    every = np.ones(_TOKENS, dtype=bool)
    print(f"{kv.num_bytes / 2**20:.0f} MiB")
    for kind in ("redis", "mooncake"):
        with shared_server(kind) as server:
            remote = server.open()
            tier = SharedTier(remote, 1000.0)
            timed(f"{kind}: published", lambda tier=tier: tier.put(stored))
            timed(f"{kind}: fetched", lambda tier=tier: tier.rows(tier.head("a", "ns"), every))
            remote.close()
    with KVShare("smollm2", embedder=None) as llm:
        prompt = [int(token) for token in np.arange(_TOKENS) % 1000 + 1000]
        once, off = SamplingParams(max_tokens=1), RequestOptions(reuse="off", store=False)
        timed("computed", lambda: llm.generate(prompt, once, off), 4)


if __name__ == "__main__":
    main()
