"""What a request is stored as, when it is over or while it is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvshare_mm.config import Reuse
from kvshare_mm.reuse.plan import KeptRun, ReusePlan
from kvshare_mm.reuse.scheduler import ReuseScheduler
from kvshare_mm.vllm.lookup import Lookup
from kvshare_mm.vllm.meta import Save


class Saving:
    """Lives in the scheduler side.

    Args:
        default: what may be reused where a request does not say.
        reuse: the donors.
        text: what a request of these keys is found by, where donors are searched by meaning.
    """

    def __init__(
        self, default: Reuse, reuse: ReuseScheduler, text: Callable[[np.ndarray], str]
    ) -> None:
        self._default = default
        self._reuse = reuse
        self._text = text

    def keep(
        self, request: Any, lookup: Lookup, length: int, block_ids: list[int], over: bool = True
    ) -> Save | None:
        """The order to store a request, if it is worth it.

        Args:
            length: positions whose KV is computed.
            block_ids: where it is.
            over: it is answered.
        """
        off = (lookup.options.reuse or self._default) == "off"
        if not lookup.options.store or lookup.stream is None or off:
            return None
        stream = lookup.stream
        answer = np.asarray(request.all_token_ids[len(stream) : length], np.uint64)
        keys = np.concatenate((stream.align_keys, answer))
        node = self._reuse.save(
            keys,
            lookup.namespace,
            lookup.used or self._exact(lookup),
            self._text(keys) if self._reuse.semantic is not None else "",
            positions=stream.positions_to(length),
            media=stream.media,
            over=over,
        )
        if node is None:
            return None
        last = request.num_prompt_tokens - 1
        token = int(request.all_token_ids[last])
        return Save(request.request_id, node, tuple(block_ids), last, token, held=not over)

    def _exact(self, lookup: Lookup) -> ReusePlan:
        """What an exact request has of others: most of itself, if its prompt is stored already."""
        assert lookup.stream is not None
        n = len(lookup.stream)
        early = self._reuse.catalogue.tree.get(lookup.early or "")
        # What it loaded then may have been approximate, and computed after a preemption.
        if early is not None and early.exact_len == len(early):
            return ReusePlan(n, (KeptRun(early.node_id, 0, 0, n - 1, exact=True),))
        if (plan := lookup.plan) is None:
            return ReusePlan(n)
        # Of whom it would have reused more, it is a version still: what audits found holds for it.
        exact = tuple(run for run in plan.runs if run.exact)
        return ReusePlan(n, exact, origin=plan.edited_from)
