"""A request on its way to its plan and, perhaps, its load, as the scheduler side knows it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from kvshare_mm.config import RequestOptions
from kvshare_mm.outputs import Provenance
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import SegmentStream
from kvshare_mm.vllm.compat import SetApart


@dataclass(slots=True)
class Lookup:
    """A request, from its arrival to its end.

    Attributes:
        num_blocks: blocks that its prompt takes.
        stream: its prompt; None if it takes no part.
        plan: what may be reused; None while it is looked up.
        overlap: share of its n-grams that a donor has, however much of that may be reused.
        declined: why nothing (more) is loaded, or None.
        apart: how its blocks are kept from exact requests; None: they need not be.
        asked: tokens of vLLM's own prefix cache when it was last asked about.
        local: the same when it first got blocks; None: it has had none.
        used: the plan that was loaded; None: none was.
        approximate_from: the first position that was loaded and is not exact.
        gaps: positions that its load computed.
        exact: it takes identical beginnings alone.
        sketch: of its prompt; None: it takes no part.
        behind: the request that it waits for, see `bursts`; None: it does not.
        has_waited: it did, or had no reason to.
        held_at: tokens that vLLM had computed when it began to.
        wanted: others wait for it.
        early: what its prompt was stored as while it is answered, "" if it could not be; None: it
            was not.
    """

    namespace: str
    options: RequestOptions
    num_blocks: int
    deadline: float = 0.0
    stream: SegmentStream | None = None
    future: Future[ReusePlan] | None = None
    plan: ReusePlan | None = None
    overlap: float = 0.0
    declined: str | None = None
    loading: bool = False
    apart: SetApart | None = None
    asked: int = 0
    local: int | None = None
    used: ReusePlan | None = None
    approximate_from: int | None = None
    gaps: int = 0
    fallback: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    exact: bool = False
    sketch: np.ndarray | None = None
    behind: str | None = None
    has_waited: bool = False
    held_at: int = 0
    wanted: bool = False
    early: str | None = None

    @property
    def waits(self) -> bool:
        """Whether it does not ask for blocks yet: for its plan, or for another request."""
        return self.future is not None or self.behind is not None

    @property
    def is_planned(self) -> bool:
        """Whether its plan is being made, or will be."""
        return self.future is not None and not self.future.done()

    def outcome(self, num_prompt_tokens: int) -> tuple[Provenance, int]:
        """What became of a prompt that is over, and its gaps."""
        use, gaps = self.provenance, self.gaps
        if self.loading or self.local is None:
            use, gaps = Provenance(), 0  # it ended before anything was computed
        promise = self.used.promise if self.used is not None and use.reused else None
        use = replace(
            use,
            expected_divergence=None if promise is None else promise.expected,
            recomputed=num_prompt_tokens - use.exact - use.reused,
            declined=self.declined and str(self.declined),
            fallback=self.fallback,
        )
        return use, gaps
